"""Once per run, on the server: draw, deal, tokenise and store the data that every worker then maps into memory.

The result is cached under a key of everything that determines it: texts and labels, the partition, draws and seed, and
the tokenizer. A second run with the same data starts without tokenising, or even loading the tokenizer.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from hfedmoe_ray.config.data import Data
from hfedmoe_ray.config.evaluation import Benchmark
from hfedmoe_ray.context import PreparedData
from hfedmoe_ray.data import store
from hfedmoe_ray.data.benchmarks import Asked, read_benchmark
from hfedmoe_ray.data.instructions import tokenized
from hfedmoe_ray.data.labels import IntArray
from hfedmoe_ray.data.partition import deal, split_own_test
from hfedmoe_ray.data.sources import RawDataset, draw_subset
from hfedmoe_ray.data.tokenize import load_tokenizer, pad_id, tokenizer_hash
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.types import Array

_NOT_STORED = {"source", "subset", "text", "label", "test", "prompt", "packing"}
"""Keys of `data` that say where texts come from, which count by themselves, or how batches are made of them."""


def prepare_data(
    data: Data,
    raw: RawDataset,
    *,
    tokenizer_dir: Path,
    clients: int,
    seed: int,
    cache: Path,
    benchmarks: Sequence[Benchmark] = (),
    translates: bool = False,
) -> PreparedData:
    """Draws, deals, tokenises and stores a dataset as `<cache>/data/<key>/` (see `store`), unless it is there already.

    Where clients read their own files, only the global test split and the tokenizer are stored: a client's texts are
    read and tokenised on its own node (see `dataset`) and all counts are zero.

    Args:
        data: The `data` section of the configuration.
        raw: What `sources.load_raw` read for it.
        tokenizer_dir: Directory that `AutoTokenizer` can load.
        clients: Number of clients, C.
        seed: Run seed: of the draws, the partition and the clients' own test splits.
        cache: Directory for prepared data; created as needed.
        benchmarks: What else is asked, to be stored along.
        translates: Whether an encoder reads the prompts, and a decoder writes the responses.

    Raises:
        DataError: the examples cannot be dealt as the partition asks, or a benchmark's file is wrong.
        ModelError: there is no tokenizer in `tokenizer_dir`.
    """
    asked = {benchmark.name: read_benchmark(benchmark) for benchmark in benchmarks}
    path = (
        cache.resolve()
        / "data"
        / _cache_key(data, raw, asked, tokenizer_hash(tokenizer_dir), clients, seed, translates)
    )
    meta = store.read_meta(path) or _build(
        data,
        raw,
        asked,
        tokenizer_dir=tokenizer_dir,
        clients=clients,
        seed=seed,
        path=path,
        translates=translates,
    )
    return PreparedData(path=path, sha256=meta.sha256, label_names=meta.label_names, counts=meta.counts, cut=meta.cut)


def _cache_key(  # noqa: PLR0917 - all that determines it
    data: Data,
    raw: RawDataset,
    asked: Mapping[str, Asked],
    tokenizer: str,
    clients: int,
    seed: int,
    translates: bool,
) -> str:
    # The texts themselves count, not the name of the file they came from.
    digest = hashlib.sha256()
    fields = (raw.train_texts, raw.test_texts, raw.train_groups, raw.train_prompts, raw.test_prompts)
    for texts in (field or () for field in fields):
        for text in (str(len(texts)), *texts):
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
    facts = {
        "format": store.FORMAT,
        "data": data.model_dump(mode="json", exclude=_NOT_STORED),
        "label_names": raw.label_names,
        "texts": digest.hexdigest(),
        "asked": store.content_hash({}, {name: one.facts for name, one in asked.items()}),
        "tokenizer": tokenizer,
        "clients": clients,
        "seed": seed,
        "translates": translates,
    }
    return store.content_hash({"train": raw.train_labels, "test": raw.test_labels}, facts)[:24]


def _build(
    data: Data,
    raw: RawDataset,
    asked: Mapping[str, Asked],
    *,
    tokenizer_dir: Path,
    clients: int,
    seed: int,
    path: Path,
    translates: bool,
) -> store.Meta:
    raw = draw_subset(raw, data, seed)
    own_files = data.partition.how == "files"
    rows, bounds = _nothing_dealt(clients) if own_files else _deal_and_split(data, raw, clients, seed)
    labels = raw.train_labels[rows]
    tokenizer = load_tokenizer(tokenizer_dir)
    arrays: dict[str, Array] = {"bounds": bounds, "train.labels": labels, "test.labels": raw.test_labels}
    train_prompts = None if raw.train_prompts is None else [raw.train_prompts[row] for row in rows]
    cut = 0
    for split, texts, prompts in (
        ("train", [raw.train_texts[row] for row in rows], train_prompts),
        ("test", raw.test_texts, raw.test_prompts),
    ):
        tokens, shortened = tokenized(tokenizer, texts, prompts, data, translates=translates)
        arrays |= {f"{split}.{name}": array for name, array in tokens.items()}
        cut += shortened
    classes = len(raw.label_names)
    meta = store.Meta(
        sha256="",
        seed=seed,
        label_names=raw.label_names,
        counts=tuple(
            tuple(np.bincount(labels[start:own_test], minlength=classes).tolist()) for start, own_test, _ in bounds
        ),
        max_length=data.max_length,
        pad_id=pad_id(tokenizer),
        tokenizer_sha256=tokenizer_hash(tokenizer_dir),
        written=raw.train_prompts is not None,
        translates=translates,
        cut=cut,
    )
    # What a model is asked besides makes no other run of it.
    meta = replace(meta, sha256=store.content_hash(arrays, asdict(meta)))
    for name, one in asked.items():
        made = one.tokenized(tokenizer, data.max_length, translates=translates)
        arrays |= {f"{store.benchmark(name)}.{part}": array for part, array in made.items()}
    store.write(path, arrays, meta, tokenizer if own_files else None)
    return meta


def _deal_and_split(data: Data, raw: RawDataset, clients: int, seed: int) -> tuple[IntArray, IntArray]:
    """Deals the examples and splits off each client's own test examples.

    Returns:
        Row numbers of all examples, each client's training rows followed by its own test rows [N], and the bounds of
        those stretches [C, 3].
    """
    pieces = []
    bounds = np.zeros((clients, 3), dtype=np.int64)
    end = 0
    for client, part in enumerate(deal(data.partition, raw.train_labels, raw.train_groups, clients, seed)):
        train, own_test = split_own_test(raw.train_labels[part], data.own_test, generator(seed, "own-test", client))
        pieces += [part[train], part[own_test]]
        bounds[client] = end, end + len(train), end + len(part)
        end += len(part)
    return np.concatenate(pieces), bounds


def _nothing_dealt(clients: int) -> tuple[IntArray, IntArray]:
    return np.empty(0, dtype=np.int64), np.zeros((clients, 3), dtype=np.int64)
