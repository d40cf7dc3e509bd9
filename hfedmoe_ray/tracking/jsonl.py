"""Strict JSON, one value a line: what a run's record is written in, and how it survives a crash.

Strict means that any parser reads it: NaN and infinities, which Python would happily print, become null.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np

from hfedmoe_ray.errors import CheckpointError


def plain(value: object) -> Any:
    """Returns `value` as JSON types only.

    Dataclasses become mappings, tuples, sets and arrays lists, numbers that are not finite None, and anything else
    (paths, versions) its text: writing a record must never be what stops a run.
    """
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    match value:
        case None | bool() | str():
            return value
        case int():
            return int(value)
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple() | Set():
            return [plain(item) for item in (sorted(value, key=str) if isinstance(value, Set) else value)]
    return str(value)


def dumps(value: object, *, indent: int | None = None) -> str:
    """Returns strictly valid JSON, in ASCII so that no encoding can spoil it."""
    try:
        return json.dumps(value, indent=indent, allow_nan=False, default=plain)
    except (TypeError, ValueError):  # numbers that are not finite, or keys that are no text
        return json.dumps(plain(value), indent=indent, allow_nan=False)


def append_line(path: Path, value: object) -> None:
    """Appends one line and closes the file, so that a reader, or a crash, never waits for a buffer."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(dumps(value) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Returns the lines of a JSONL file, nothing for a missing file.

    A last line without its newline was torn by a crash and is left out.

    Raises:
        CheckpointError: A complete line is not a JSON object.
    """
    if not path.exists():
        return []
    *complete, _torn = path.read_text(encoding="utf-8").split("\n")
    lines = []
    for number, text in enumerate(complete, start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise CheckpointError(
                f"{path}, line {number}, is not JSON ({error}). The file was edited or the disk lost part of it; "
                "delete that line, or the run directory."
            ) from error
        if not isinstance(line, dict):
            raise CheckpointError(
                f"{path}, line {number}, is not a JSON object. Delete that line, or the run directory."
            )
        lines.append(line)
    return lines


def write_atomic(path: Path, text: str) -> None:
    """Replaces a file as a whole: whoever reads it sees the old text or the new, never half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
