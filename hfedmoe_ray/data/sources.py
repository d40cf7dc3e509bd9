"""From `data.source` to texts and class numbers: packaged datasets, local files, the hub, and clients' own files."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from string import Formatter

import numpy as np

from hfedmoe_ray.config.data import Data
from hfedmoe_ray.data.labels import IntArray, encode_labels, label_names, shown_value
from hfedmoe_ray.data.partition import draw_examples
from hfedmoe_ray.data.tables import Table, read_file, read_hub, read_packaged
from hfedmoe_ray.errors import DataError
from hfedmoe_ray.seeds import generator

_TRAIN = ("train", "training")
TEST_SPLITS = ("test", "validation", "valid", "val", "dev")
"""Values of a `split` column, or names of the hub's splits, in the order in which a test split is looked for."""
_ONE_KIND = ("all",)
"""Class of examples that nothing tells apart."""


@dataclass(frozen=True, kw_only=True)
class RawDataset:
    """A dataset as text, before anything is drawn from it or dealt."""

    train_texts: tuple[str, ...]
    """What is read, or, where there are prompts, what is to be written after them."""
    train_labels: IntArray
    """Class numbers [N]."""
    train_groups: tuple[str, ...] | None
    """Value of the natural key of each training example; None for other partitions."""
    test_texts: tuple[str, ...]
    test_labels: IntArray
    label_names: tuple[str, ...]
    """Name of each class number."""
    train_prompts: tuple[str, ...] | None = None
    """Prompt of each training example of a model that writes (may be empty); None for classification."""
    test_prompts: tuple[str, ...] | None = None


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
    names = data.labels or _kinds(data, train, test)
    train_texts, train_labels = _examples(train, data, names)
    test_texts, test_labels = _examples(test, data, names)
    raw = RawDataset(
        train_prompts=_prompts(train, data),
        test_prompts=_prompts(test, data),
        train_texts=train_texts,
        train_labels=train_labels,
        train_groups=None if train is None or data.partition.key is None else _groups(train, data.partition.key),
        test_texts=test_texts,
        test_labels=test_labels,
        label_names=names,
    )
    return _hold_out(raw) if train is not None and test is None else raw


def load_client_file(data: Data, client: int) -> tuple[tuple[str, ...], IntArray, tuple[str, ...] | None]:
    """Reads the file of one client, on the node where that client lives (`partition.how: files`).

    Returns:
        Its texts, their class numbers [n] in `data.labels`, and their prompts (None for classification).

    Raises:
        DataError: the file is missing or wrong, or holds fewer than `min_examples` examples. The server is told of it,
            so it quotes no value of the file.
    """
    path = data.source.replace("{client}", str(client))
    table = read_file(path, f"data.source of client {client}", wanted_columns(data))
    names = data.labels or (_ONE_KIND if data.response else ())
    texts, labels = _examples(table, data, names, private=True)
    if len(texts) < data.partition.min_examples:
        raise DataError(
            f"data.source of client {client}: {path} holds {len(texts)} examples, fewer than "
            f"data.partition.min_examples ({data.partition.min_examples}). Add examples, lower min_examples, or leave "
            "the client out."
        )
    return texts, labels, _prompts(table, data, private=True)


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
            train_prompts=_of_rows(raw.train_prompts, rows),
        )
    if data.test_examples is not None and data.test_examples < len(raw.test_texts):
        rows = draw_examples(raw.test_labels, data.test_examples, generator(seed, "test-examples"))
        raw = replace(
            raw,
            test_texts=tuple(raw.test_texts[row] for row in rows),
            test_labels=raw.test_labels[rows],
            test_prompts=_of_rows(raw.test_prompts, rows),
        )
    return raw


# ------------------------------------------------------------------------------------------------------ splits


def _read_source(data: Data) -> tuple[Table, Table | None]:
    """Returns the training rows and, if the source has one, its own test split."""
    wanted = (*wanted_columns(data), "split", *((data.partition.key,) if data.partition.key else ()))
    kind, _, name = data.source.partition(":")
    if kind == "package":
        return read_packaged(name)
    if kind == "hub":
        return _choose_hub_splits(read_hub(name, data.subset, wanted), data)
    return _by_split_column(read_file(data.source, "data.source", wanted))


def _read_test_file(path: str, data: Data) -> Table:
    """Returns the rows that a column `split` marks as test; all rows without such a column."""
    table = read_file(path, "data.test", (*wanted_columns(data), "split"))
    if not _has_split_column(table):
        return table
    test = split_rows(table, TEST_SPLITS)
    if test is None:
        raise DataError(
            f"data.test: the column `split` of {path} marks no row as {', '.join(TEST_SPLITS)}. Mark the test rows, or "
            "remove the column if all rows are."
        )
    return test


def _by_split_column(table: Table) -> tuple[Table, Table | None]:
    """Returns the rows that a column `split` marks as train and as test; all rows as train without such a column."""
    if not _has_split_column(table):
        return table, None
    train = split_rows(table, _TRAIN)
    if train is None:
        found = ", ".join(sorted(set(map(str, table.columns["split"]))))
        raise DataError(
            f"data.source: the column `split` of {table.where} marks no row as train (it has {found}). Mark the "
            "training rows, or remove the column to have a tenth of the rows held out as test split."
        )
    return train, split_rows(table, TEST_SPLITS)


def _has_split_column(table: Table) -> bool:
    """Whether there is a column `split` that holds names of splits and nothing else."""
    return "split" in table.columns and all(mark in (*_TRAIN, *TEST_SPLITS) for mark in table.columns["split"])


def split_rows(table: Table, names: Sequence[str]) -> Table | None:
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
        for name in TEST_SPLITS
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
        train_prompts=_of_rows(raw.train_prompts, train),
        test_texts=tuple(raw.train_texts[row] for row in test),
        test_labels=raw.train_labels[test],
        test_prompts=_of_rows(raw.train_prompts, test),
    )


# -------------------------------------------------------------------------------------------------------- rows


def wanted_columns(data: Data) -> tuple[str, ...]:
    """Names of the columns that texts, prompts and labels are made of."""
    if data.response is None:
        return data.text, data.label
    patterns = (data.response,) if data.prompt is None else (data.prompt, data.response)
    return (*(name for pattern in patterns for name in columns_of(pattern)), data.label)


def _kinds(data: Data, train: Table | None, test: Table | None) -> tuple[str, ...]:
    """Names of the classes; of examples that are to be written, of their kinds: one where nothing tells them apart."""
    if data.response is None:
        if train is None:
            return ()
        return train.classes.get(data.label) or label_names(train.column(data.label, "data.label"), train.where)
    tables = [table for table in (train, test) if table is not None and data.label in table.columns]
    values = [value for table in tables for value in table.columns[data.label]]
    needed = data.partition.how in ("dirichlet", "shards")
    if train is not None and needed:
        train.column(data.label, "data.label")
    several = len(set(values)) > 1 or needed
    return label_names(values, tables[0].where) if several and values else _ONE_KIND


def _examples(
    table: Table | None, data: Data, names: Sequence[str], *, private: bool = False
) -> tuple[tuple[str, ...], IntArray]:
    if table is None:
        return (), np.empty(0, dtype=np.int64)
    if data.response is None:
        texts = texts_of(table, data.text, "data.text", private=private)
    else:
        texts = texts_of(table, data.response, "data.response", private=private)
        if tuple(names) == _ONE_KIND or data.label not in table.columns:
            return texts, np.zeros(len(texts), dtype=np.int64)
    return texts, encode_labels(table.column(data.label, "data.label"), names, table.where, private=private)


def _prompts(table: Table | None, data: Data, *, private: bool = False) -> tuple[str, ...] | None:
    """The prompt of each row; None for classification."""
    if data.response is None:
        return None
    if table is None:
        return ()
    if data.prompt is None:
        return ("",) * len(table.column(columns_of(data.response)[0], "data.response"))
    return texts_of(table, data.prompt, "data.prompt", private=private)


def texts_of(table: Table, pattern: str, key: str, *, private: bool = False) -> tuple[str, ...]:
    """What a column, or a pattern of columns, says in each row.

    Args:
        table: Has the columns.
        pattern: See `columns_of`.
        key: The configuration key that asks for it.
        private: Whether an error must not quote what a row holds.

    Raises:
        DataError: A column is missing, or a row of it is no text.
    """
    names = columns_of(pattern)
    columns = {name: table.column(name, key) for name in names}
    texts = []
    for row in range(len(columns[names[0]])):
        values = {name: column[row] for name, column in columns.items()}
        if names == (pattern,):
            text = values[pattern]
            if not isinstance(text, str):
                found = shown_value(text, private=private)
                raise DataError(
                    f"{table.where}, row {row + 1}: {found} in column {pattern!r} is not text. Every row needs a "
                    f"text; point {key} at the right column, or remove the row."
                )
            texts.append(text)
        else:
            empty = next((name for name, value in values.items() if value is None), None)
            if empty is not None:
                raise DataError(
                    f"{table.where}, row {row + 1}: nothing in column {empty!r}, which {key} puts into a text. Fill it "
                    "in, or remove the row."
                )
            texts.append(pattern.format(**values))
    return tuple(texts)


def columns_of(pattern: str) -> tuple[str, ...]:
    """Names of the columns in a pattern such as "Question: {question}"; a pattern without any is a column itself.

    Raises:
        DataError: Braces do not match.
    """
    try:
        names = [name for _, name, _, _ in Formatter().parse(pattern) if name is not None]
    except ValueError as error:
        raise DataError(
            f"data.prompt or data.response: {pattern!r} is no pattern ({error}). Write {{column}}, and braces that are "
            "to stay twice."
        ) from error
    return tuple(dict.fromkeys(names)) or (pattern,)


def _of_rows(values: tuple[str, ...] | None, rows: IntArray) -> tuple[str, ...] | None:
    return None if values is None else tuple(values[row] for row in rows)


def _groups(table: Table, key: str) -> tuple[str, ...]:
    values = table.column(key, "data.partition.key")
    missing = next((row for row, value in enumerate(values, start=1) if value is None), None)
    if missing is not None:
        raise DataError(
            f"{table.where}, row {missing}: no value in column {key!r} (data.partition.key), so no client to give the "
            "row to. Fill it in, or remove the row."
        )
    return tuple(map(str, values))
