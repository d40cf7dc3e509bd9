"""Tiny random source models, saved as transformers saves them, with a tokenizer of twenty words."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    MixtralConfig,
    MixtralForSequenceClassification,
    PreTrainedTokenizerFast,
)

from hfedmoe_ray.config.model import Model
from hfedmoe_ray.context import PreparedModel
from hfedmoe_ray.moe import layout as layouts
from hfedmoe_ray.moe import shape
from hfedmoe_ray.moe.prepare import initial_weights, prepare_model
from hfedmoe_ray.types import AbsentMode, ExpertKey, ExpertPlan, Role, TaskWeights

WORDS = ["[PAD]", "[UNK]", "</s>", *(f"word{i}" for i in range(17))]
TEXTS = [" ".join(f"word{(7 * i + j * j) % 17}" for j in range(3 + i % 9)) for i in range(40)]
LABELS = 5
T, F, A = Role.TRAIN, Role.FROZEN, Role.ABSENT


def save_tokenizer(directory: Path, pad: bool = True) -> None:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "[UNK]", "eos_token": "</s>"} | ({"pad_token": "[PAD]"} if pad else {})
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(directory)


def save_bert(directory: Path, **changes: Any) -> Path:
    """A dense BERT of 4 layers, hidden size 24, FFN 48."""
    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertModel(BertConfig(**(sizes | changes)))
        # transformers initialises biases with zeros; here they must count.
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def save_mixtral(directory: Path, pad: bool = True, **changes: Any) -> Path:
    """A Mixtral of 2 layers, hidden size 16, 6 experts of 20 neurons, top-2."""
    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 2,
        "num_labels": 3,
        "pad_token_id": 0 if pad else None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MixtralForSequenceClassification(MixtralConfig(**(sizes | changes)))
    model.save_pretrained(directory)
    save_tokenizer(directory, pad)
    return directory


DECODER = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 12,
    "routed_scaling_factor": 1.5,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {**DECODER, "num_hidden_layers": 2, "num_local_experts": 6},
    "olmoe": {**DECODER, "num_hidden_layers": 2, "num_experts": 6},
    "qwen2_moe": {
        **DECODER,
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        "num_experts": 6,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 20,
    },
    "qwen3_moe": {
        **DECODER,
        "num_hidden_layers": 3,
        "mlp_only_layers": [1],
        "head_dim": 4,
        "num_local_experts": 6,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
    },
    "deepseek_v2": {**DECODER, **LATENT_ATTENTION, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**DECODER, **LATENT_ATTENTION},
    "gpt_oss": {
        **DECODER,
        "num_hidden_layers": 2,
        "num_local_experts": 6,
        "head_dim": 4,
        "swiglu_limit": 1.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 32,
        },
    },
    "switch_transformers": {
        "vocab_size": len(WORDS),
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 20,
        "num_heads": 4,
        "num_layers": 4,
        "num_sparse_encoder_layers": 2,
        "num_decoder_layers": 1,
        "num_sparse_decoder_layers": 0,
        "num_experts": 6,
        "expert_capacity": 3,
        "eos_token_id": 2,
        "decoder_start_token_id": 0,
    },
}
"""Configurations of transformers' families: each has two MoE layers of 6 experts, top-2 (Switch top-1)."""


DOCUMENTED = "minimax_m2"
"""The family that docs/adding-a-family.md adds."""


@contextmanager
def known_to_the_package(family: str) -> Iterator[None]:
    """Adds the documented family by executing the blocks of the document, for as long as it is needed."""
    if family != DOCUMENTED:
        yield
        return
    text = (Path(__file__).parents[2] / "docs" / "adding-a-family.md").read_text(encoding="utf-8")
    layout, configuration = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert layout.count("\n") < 60
    names: dict[str, Any] = {"__name__": "documented_family"}
    exec(compile(layout, "docs/adding-a-family.md", "exec"), names)
    added: dict[str, dict[str, Any]] = {}
    exec(configuration, {"FAMILIES": added, "DECODER": DECODER})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, family, added[family])
        patch.setitem(layouts.FAMILIES, family, names["MiniMaxM2Layout"])
        patch.setattr(shape, "MOE_FAMILIES", (*shape.MOE_FAMILIES, family))
        yield


def save_family(family: str, directory: Path, **changes: Any) -> Path:
    """A tiny random language model as it is published: no classification head."""
    config = AutoConfig.for_model(family, **(FAMILIES[family] | changes))
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = auto.from_config(config)
        # transformers initialises biases with zeros and norms with ones; here they must count.
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("bias"):
                tensor.normal_(std=0.1)
            elif "norm" in name:
                tensor.add_(0.1 * torch.randn_like(tensor))
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def model_section(source: Path, **changes: Any) -> Model:
    """Section `model` of a configuration; the tiny BERT is split into 6 experts, top-2, in layers 1 and 3."""
    dense = (source / "config.json").read_text().find('"bert"') >= 0
    upcycle = {"how": "split", "experts": 6, "top_k": 2, "layers": [1, 3], "calibration_steps": 20} if dense else None
    return Model.model_validate({"source": str(source), "upcycle": upcycle, "trainable": "top"} | changes)


def prepare(source: Path, cache: Path, **changes: Any) -> PreparedModel:
    return prepare_model(model_section(source, **changes), LABELS, 0, TEXTS, cache)


def task_weights(prepared: PreparedModel, trainable: str = "top") -> TaskWeights:
    """The initial weights as a task receives them: read-only arrays."""
    weights = initial_weights(prepared, trainable)
    arrays = [*weights.shared.values(), *(a for tensors in weights.experts.values() for a in tensors.values())]
    for array in arrays:
        array.setflags(write=False)
    return TaskWeights(shared=weights.shared, experts=weights.experts, means=weights.means)


def plan(*rows: str, absent: AbsentMode = "mean") -> ExpertPlan:
    """A plan from one string a layer, a letter an expert: T(rain), F(rozen), or . for absent."""
    roles = {"T": T, "F": F, ".": A}
    return ExpertPlan(roles=tuple(tuple(roles[letter] for letter in row) for row in rows), absent=absent)


def batch(texts: int = 6, length: int = 9) -> tuple[Tensor, Tensor]:
    """Token ids and mask, [texts, length], rows of different lengths padded on the right with 0."""
    rng = np.random.default_rng(3)
    ids = torch.from_numpy(rng.integers(3, len(WORDS), (texts, length)))
    lengths = torch.from_numpy(rng.integers(2, length + 1, texts))
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    return ids * mask, mask


def held(plan: ExpertPlan) -> set[ExpertKey]:
    return set(plan.present)
