"""The model that benchmarks measure: a Mixtral with random weights, and texts that mean nothing, made on first use.

113 million parameters in 96 experts (6 layers of 16, top-4) of 117 million in all: 97 % are experts. What a step costs
and occupies does not depend on the values, so nothing has to be downloaded or trained.
"""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.context import RunContext, cache_dir
from hfedmoe_ray.prepare import prepare_run

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "num_local_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 512,
}
CLASSES = 8
EXAMPLES_PER_CLIENT = 64
CLIENTS = 10
TEXT_WORDS = 80
SHARES = (0.125, 0.25, 0.5, 1.0)
"""Budgets that are compared: shares of the experts. Each is a tier of the experiment."""


def experiment(*overrides: str, writes: bool = False) -> Experiment:
    """The experiment benchmarks are variations of: ten clients, no cache, one step a round.

    Args:
        overrides: `key=value`, as on the command line.
        writes: Whether the model has a language head, instead of one for classes.
    """
    source, texts = random_mixtral(SIZES, writes=writes), random_texts(CLIENTS * EXAMPLES_PER_CLIENT, TEXT_WORDS)
    tiers = [tier(share, 1 / len(SHARES)) for share in SHARES]
    keys = {
        "name": "benchmark",
        "rounds": 1,
        "clients": {"count": CLIENTS, "tiers": tiers},
        "model": {"source": str(source), "trainable": "top"},
        "data": {"source": str(texts), "max_length": 64, "test_examples": 64, "own_test": 0.0},
        "local": {"steps": 1, "batch_size": 8, "cache": "off"},
        "tracking": {"wandb": {"mode": "disabled"}},
    }
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "benchmark.yaml"
        file.write_text(json.dumps(keys))  # JSON is YAML
        return load_experiment(file, overrides)


def tier(experts: float, share: float) -> dict[str, Any]:
    """A tier of the configuration for a share of the clients, with memory for its share of the experts."""
    name = f"experts-{experts}"
    return {"name": name, "share": share, "experts": experts, "device": 0.2, "memory_gib": 0.5 + 3.5 * experts}


def prepared(*overrides: str, writes: bool = False) -> RunContext:
    """The run context of `experiment`: model and data lie in the cache, some 15 s the first time."""
    return prepare_run(experiment(*overrides, writes=writes), cache_dir() / "benchmark" / "run")


def random_mixtral(sizes: Mapping[str, int], *, writes: bool = False) -> Path:
    """Directory of a Mixtral with random weights, as transformers saves it, with a tokenizer of random words."""
    directory = cache_dir() / "benchmark" / f"mixtral-{_digest(sizes)}{'-writes' if writes else ''}"
    if directory.is_dir():
        return directory
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        MixtralConfig,
        MixtralForCausalLM,
        MixtralForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    from hfedmoe_ray.moe.quiet import quiet_transformers

    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as temporary, quiet_transformers():
        complete = Path(temporary) / "model"
        words = Tokenizer(models.WordLevel(_vocabulary(), unk_token="[UNK]"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(complete)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = MixtralConfig(**sizes, num_labels=CLASSES, pad_token_id=0, bos_token_id=None, eos_token_id=None)
            (MixtralForCausalLM if writes else MixtralForSequenceClassification)(config).save_pretrained(complete)
        complete.rename(directory)
    return directory


def random_texts(count: int, length: int) -> Path:
    """File of so many labelled texts of random words, and a quarter more to test on."""
    file = cache_dir() / "benchmark" / f"texts-{count}-{length}.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        words = np.array(list(_vocabulary())[2:])
        rows = [
            {"text": " ".join(rng.choice(words, length)), "label": f"class {row % CLASSES}"}
            for row in range(count * 5 // 4)  # a part becomes the test split
        ]
        partial = file.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
        partial.rename(file)
    return file


def _vocabulary() -> dict[str, int]:
    words = ["[PAD]", "[UNK]", *(f"word{number}" for number in range(SIZES["vocab_size"] - 2))]
    return {word: number for number, word in enumerate(words)}


def _digest(sizes: Mapping[str, int]) -> str:
    return "-".join(str(size) for size in sizes.values())
