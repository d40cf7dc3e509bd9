"""From `data.source` to texts and class numbers: packaged datasets, local files, the hub, and clients' own files."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from hfedmoe_ray.config.schema import Data
from hfedmoe_ray.data.labels import IntArray, encode_labels, label_names, shown_value
from hfedmoe_ray.data.partition import draw_examples
from hfedmoe_ray.data.tables import Table, read_file, read_hub, read_packaged
from hfedmoe_ray.errors import DataError
from hfedmoe_ray.seeds import generator

_TRAIN = ("train", "training")
_TEST = ("test", "validation", "valid", "val", "dev")
"""Values of a `split` column, or names of the hub's splits, in the order in which a test split is looked for."""


@dataclass(frozen=True, kw_only=True)
class RawDataset:
    """A dataset as text, before anything is drawn from it or dealt."""

    train_texts: tuple[str, ...]
    train_labels: IntArray
    """Class numbers [N]."""
    train_groups: tuple[str, ...] | None
    """Value of the natural key of each training example; None for other partitions."""
    test_texts: tuple[str, ...]
    test_labels: IntArray
    label_names: tuple[str, ...]
    """Name of each class number."""


def load_raw(data: Data) -> RawDataset:
    """Reads the dataset: training examples, global test split and label names.

    The test split is, in this order: the file `data.test`; the source's own (a package's or the hub's test split, or
    the rows marked test, else validation, in a column `split`); a tenth of the examples, drawn stratified by label
    and always the same, whatever the run's seed. Where clients read their own files, only `data.test` is read here.

    Raises:
        DataError: a source, file, column, text or label is missing or wrong.
    """
    train, test = (None, None) if data.partition.how == "files" else _read_source(data)
    if data.test is not None:
        test = _read_test_file(data.test, data)
    names = data.labels or ()
    if train is not None and not names:
        values = train.column(data.label, "data.label")
        names = train.classes.get(data.label) or label_names(values, train.where)
    train_texts, train_labels = _examples(train, data, names)
    test_texts, test_labels = _examples(test, data, names)
    raw = RawDataset(
        train_texts=train_texts,
        train_labels=train_labels,
        train_groups=None if train is None or data.partition.key is None else _groups(train, data.partition.key),
        test_texts=test_texts,
        test_labels=test_labels,
        label_names=names,
    )
    return _hold_out(raw) if train is not None and test is None else raw


def load_client_file(data: Data, client: int) -> tuple[tuple[str, ...], IntArray]:
    """Reads the file of one client, on the node where that client lives (`partition.how: files`).

    Returns:
        Its texts and their class numbers [n] in `data.labels`.

    Raises:
        DataError: the file is missing or wrong, or holds fewer than `min_examples` examples. The server is told of it,
            so it quotes no value of the file.
    """
    path = data.source.replace("{client}", str(client))
    table = read_file(path, f"data.source of client {client}", (data.text, data.label))
    texts, labels = _examples(table, data, data.labels or (), private=True)
    if len(texts) < data.partition.min_examples:
        raise DataError(
            f"data.source of client {client}: {path} holds {len(texts)} examples, fewer than "
            f"data.partition.min_examples ({data.partition.min_examples}). Add examples, lower min_examples, or leave "
            "the client out."
        )
    return texts, labels


def draw_subset(raw: RawDataset, data: Data, seed: int) -> RawDataset:
    """Keeps `max_examples` training and `test_examples` test examples, each drawn stratified by label.

    Every class keeps its share up to rounding; order is kept; the draw depends on the run's seed alone.
    """
    if data.max_examples is not None and data.max_examples < len(raw.train_texts):
        rows = draw_examples(raw.train_labels, data.max_examples, generator(seed, "train-examples"))
        raw = replace(
            raw,
            train_texts=tuple(raw.train_texts[row] for row in rows),
            train_labels=raw.train_labels[rows],
            train_groups=raw.train_groups and tuple(raw.train_groups[row] for row in rows),
        )
    if data.test_examples is not None and data.test_examples < len(raw.test_texts):
        rows = draw_examples(raw.test_labels, data.test_examples, generator(seed, "test-examples"))
        raw = replace(raw, test_texts=tuple(raw.test_texts[row] for row in rows), test_labels=raw.test_labels[rows])
    return raw


# ------------------------------------------------------------------------------------------------------ splits


def _read_source(data: Data) -> tuple[Table, Table | None]:
    """Returns the training rows and, if the source has one, its own test split."""
    wanted = (data.text, data.label, "split", *((data.partition.key,) if data.partition.key else ()))
    kind, _, name = data.source.partition(":")
    if kind == "package":
        return read_packaged(name)
    if kind == "hub":
        return _choose_hub_splits(read_hub(name, data.subset, wanted), data)
    return _by_split_column(read_file(data.source, "data.source", wanted))


def _read_test_file(path: str, data: Data) -> Table:
    """Returns the rows that a column `split` marks as test; all rows without such a column."""
    table = read_file(path, "data.test", (data.text, data.label, "split"))
    if not _has_split_column(table):
        return table
    test = _split_rows(table, _TEST)
    if test is None:
        raise DataError(
            f"data.test: the column `split` of {path} marks no row as {', '.join(_TEST)}. Mark the test rows, or "
            "remove the column if all rows are."
        )
    return test


def _by_split_column(table: Table) -> tuple[Table, Table | None]:
    """Returns the rows that a column `split` marks as train and as test; all rows as train without such a column."""
    if not _has_split_column(table):
        return table, None
    train = _split_rows(table, _TRAIN)
    if train is None:
        found = ", ".join(sorted(set(map(str, table.columns["split"]))))
        raise DataError(
            f"data.source: the column `split` of {table.where} marks no row as train (it has {found}). Mark the "
            "training rows, or remove the column to have a tenth of the rows held out as test split."
        )
    return train, _split_rows(table, _TEST)


def _has_split_column(table: Table) -> bool:
    """Whether there is a column `split` that holds names of splits and nothing else."""
    return "split" in table.columns and all(mark in (*_TRAIN, *_TEST) for mark in table.columns["split"])


def _split_rows(table: Table, names: Sequence[str]) -> Table | None:
    """Returns the rows of the first of the named splits that the column `split` has, if any."""
    marks = table.columns["split"]
    name = next((name for name in names if name in marks), None)
    if name is None:
        return None
    return table.rows([row for row, mark in enumerate(marks) if mark == name], f"{table.where}, split {name}")


def _choose_hub_splits(splits: dict[str, Table], data: Data) -> tuple[Table, Table | None]:
    train = next((splits[name] for name in _TRAIN if name in splits), None)
    if train is None:
        raise DataError(
            f"data.source: {data.source} has no split named train (it has {', '.join(splits)}). Choose another "
            "data.subset, or save the split as a file and give that."
        )
    # Some benchmarks of the hub keep the labels of their test split to themselves; then the validation split serves.
    labelled = (
        splits[name]
        for name in _TEST
        if name in splits and any(value is not None for value in splits[name].columns.get(data.label, ()))
    )
    return train, next(labelled, None)


def _hold_out(raw: RawDataset) -> RawDataset:
    """Moves a tenth of the training examples to the (empty) test split."""
    total = len(raw.train_texts)
    if total < 2:
        raise DataError(
            "data.source: one example cannot be both trained and tested on. Give more examples, or a test file in "
            "data.test."
        )
    # Seed 0 whatever the run: accuracies of different seeds are then measured on the same examples.
    test = draw_examples(raw.train_labels, max(1, total // 10), generator(0, "held-out"))
    train = np.setdiff1d(np.arange(total), test)
    return replace(
        raw,
        train_texts=tuple(raw.train_texts[row] for row in train),
        train_labels=raw.train_labels[train],
        train_groups=raw.train_groups and tuple(raw.train_groups[row] for row in train),
        test_texts=tuple(raw.train_texts[row] for row in test),
        test_labels=raw.train_labels[test],
    )


# -------------------------------------------------------------------------------------------------------- rows


def _examples(
    table: Table | None, data: Data, names: Sequence[str], *, private: bool = False
) -> tuple[tuple[str, ...], IntArray]:
    if table is None:
        return (), np.empty(0, dtype=np.int64)
    texts = []
    for row, text in enumerate(table.column(data.text, "data.text"), start=1):
        if not isinstance(text, str):
            found = shown_value(text, private=private)
            raise DataError(
                f"{table.where}, row {row}: {found} in column {data.text!r} is not text. Every row needs a text; "
                "point data.text at the right column, or remove the row."
            )
        texts.append(text)
    labels = encode_labels(table.column(data.label, "data.label"), names, table.where, private=private)
    return tuple(texts), labels


def _groups(table: Table, key: str) -> tuple[str, ...]:
    values = table.column(key, "data.partition.key")
    missing = next((row for row, value in enumerate(values, start=1) if value is None), None)
    if missing is not None:
        raise DataError(
            f"{table.where}, row {missing}: no value in column {key!r} (data.partition.key), so no client to give the "
            "row to. Fill it in, or remove the row."
        )
    return tuple(map(str, values))
