"""How prepared data lies on disk: a directory of NumPy arrays and one `meta.json`, written whole or not at all.

    meta.json               what the arrays are, and their hash
    train.input_ids.npy     int32 [N, S], padded on the right; train.lengths.npy [N]; train.labels.npy [N];
                            train.prompts.npy [N], tokens of each prompt, where responses are to be written
    test.*.npy              the same for the global test split
    benchmark-NAME.*.npy    what a benchmark asks (`choices.Choices`, `exercises.Prompts`, `passages.Passages`)
    bounds.npy              int64 [C, 3]: client c trains on rows b0..b1 and tests on rows b1..b2 of train
    tokenizer/              only where clients read their own files (then train is empty)

Training rows are sorted by client, so that what one client reads is one contiguous, memory-mapped stretch.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hfedmoe_ray.errors import DataError
from hfedmoe_ray.types import Array

FORMAT = 3
"""Part of the cache key, raised whenever the layout above changes: data is then prepared anew."""

TOKENIZER = "tokenizer"
"""Name of the tokenizer's directory inside a prepared one."""

_META = "meta.json"


@dataclass(frozen=True, kw_only=True)
class Meta:
    """What `meta.json` holds."""

    sha256: str
    """Hash of the arrays and of everything else in here."""
    seed: int
    """Run seed of the draw, the partition and the clients' own test splits."""
    label_names: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    """Training examples by [client][class], own test split excluded."""
    max_length: int
    pad_id: int
    tokenizer_sha256: str
    written: bool
    """Whether the examples are prompts and responses."""
    translates: bool
    """Whether an encoder is to read the prompts, and a decoder to write the responses."""
    cut: int
    """Prompts and responses, own and global test split included, that were longer than `max_length`."""


def benchmark(name: str) -> str:
    """Returns what the names of a benchmark's arrays begin with."""
    return f"benchmark-{name}"


def content_hash(arrays: Mapping[str, Array], facts: object) -> str:
    """Returns the SHA-256 of named arrays (name, type, shape, bytes) and of facts that JSON can hold."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name}:{array.dtype}:{array.shape}:".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def write(path: Path, arrays: Mapping[str, Array], meta: Meta, tokenizer: Any | None) -> None:
    """Writes a directory under a temporary name and renames it into place.

    Several processes may prepare the same data at once: the first to finish wins, and what the others wrote, equal by
    construction, is dropped.

    Args:
        path: The directory to create.
        arrays: Arrays by file name without ".npy".
        meta: Their description.
        tokenizer: The tokenizer to store along, if clients will need it.

    Raises:
        DataError: the directory cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
        _fill_and_rename(draft, path, arrays, meta, tokenizer)
    except OSError as error:
        raise DataError(
            f"The prepared data cannot be written to {path.parent}: {error}. Make room there, or set HFEDMOE_CACHE to "
            "a directory that you may write to."
        ) from error


def _fill_and_rename(draft: Path, path: Path, arrays: Mapping[str, Array], meta: Meta, tokenizer: Any | None) -> None:
    try:
        draft.chmod(0o755)  # mkdtemp's directories are private, a cache may be shared
        for name, array in arrays.items():
            np.save(draft / f"{name}.npy", array)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft / TOKENIZER)
        (draft / _META).write_text(json.dumps(asdict(meta), indent=1), encoding="utf-8")
        try:
            draft.rename(path)
        except OSError:
            if not (path / _META).is_file():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read_meta(path: Path) -> Meta | None:
    """Returns the description of a prepared directory, or None if there is none; raises DataError if it is damaged."""
    try:
        stored = json.loads((path / _META).read_text(encoding="utf-8"))
        stored["label_names"] = tuple(stored["label_names"])
        stored["counts"] = tuple(map(tuple, stored["counts"]))
        return Meta(**stored)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, _META, error) from error


def open_array(path: Path, name: str) -> Array:
    """Memory-maps one array of a prepared directory, read-only; raises DataError if it is damaged."""
    try:
        return np.asarray(np.load(path / f"{name}.npy", mmap_mode="r"))
    except (OSError, ValueError) as error:
        raise _damaged(path, f"{name}.npy", error) from error


def _damaged(path: Path, file: str, error: Exception) -> DataError:
    return DataError(
        f"The prepared data in {path} is damaged: {file} cannot be read ({error}). Remove that directory; it is "
        "prepared anew at the next run."
    )
