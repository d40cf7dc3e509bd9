"""Reads a `.wandb` file: the log that W&B writes offline and uploads later.

The format is LevelDB's log: a 7-byte header (":W&B", 0xBEE1, version), then 32 KiB blocks of chunks, each
`crc32 u32, length u16, kind u8` and its bytes. A record is one FULL chunk, or FIRST, MIDDLE..., LAST; it holds a
`wandb_internal_pb2.Record`.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK = 32 * 1024
_HEADER = struct.Struct("<4sHB")
_CHUNK = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """Every record of the file, in order."""
    data = path.read_bytes()
    mark, magic, _version = _HEADER.unpack_from(data)
    assert (mark, magic) == (b":W&B", 0xBEE1), f"{path} is not a W&B file"
    offset, pending = _HEADER.size, b""
    while offset + _CHUNK.size <= len(data):
        room = _BLOCK - offset % _BLOCK
        if room < _CHUNK.size:  # Too little for a chunk's head: padding.
            offset += room
            continue
        _crc, length, kind = _CHUNK.unpack_from(data, offset)
        offset += _CHUNK.size
        chunk, offset = data[offset : offset + length], offset + length
        pending = chunk if kind in (_FULL, _FIRST) else pending + chunk
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pending)
            yield record


def history(path: Path) -> list[dict[str, Any]]:
    """What each `log` call logged, by metric name."""
    return [
        {(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        for record in records(path)
        if record.WhichOneof("record_type") == "history"
    ]


def run_record(path: Path) -> wandb_internal_pb2.RunRecord:
    """The run's head: name, group, tags, job type, configuration."""
    return next(record.run for record in records(path) if record.WhichOneof("record_type") == "run")


def config(path: Path) -> dict[str, Any]:
    """The configuration the run was started with."""
    return {update.key: json.loads(update.value_json) for update in run_record(path).config.update}


def summary(path: Path) -> dict[str, Any]:
    """The last value of everything in the summary."""
    return {
        (item.key or ".".join(item.nested_key)): json.loads(item.value_json)
        for record in records(path)
        if record.WhichOneof("record_type") == "summary"
        for item in record.summary.update
    }
