"""Hidden states below the first trainable layer, computed once per client and kept on its node.

Where the lower layers are frozen, what they compute for an example never changes. The states are written once, in a
canonical order of batches, so that all steps that read them agree to the last bit, in whichever process. In fp32 they
are what the layers computed; bf16 and fp16 take half the room and keep 8 and 11 bits of every number. An entry is one
file, written beside its place and moved there when it is complete. It never leaves the node.

Legend: N examples of a split, B examples of a batch, S stored length, H hidden.
"""

import math
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hfedmoe_ray.config.schema import LocalTraining
from hfedmoe_ray.context import cache_dir
from hfedmoe_ray.data.dataset import Split
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.train.memory import return_freed_memory
from hfedmoe_ray.types import Array

_CHUNK = 16
"""Examples per forward pass while filling: fixed, because the batch shape decides the last bits, and few, so that
filling takes less memory than training."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_STORED = {"fp32": "<f4", "bf16": "<i2", "fp16": "<f2"}
"""NumPy has no bfloat16: its bits are stored as integers."""
_PARTIAL = ".partial"
"""Ends the name of an entry that is being written."""
_ABANDONED_S = 24 * 3600.0
"""An unfinished entry this old was left by a process that died."""


class PrefixStates:
    """The states of one split, memory-mapped."""

    def __init__(self, path: Path, precision: str) -> None:
        """Maps an entry and marks it as recently used; raises FileNotFoundError if there is none."""
        os.utime(path)
        self._states = np.load(path, mmap_mode="r")  # [N, S, H]
        self._dtype = _DTYPES[precision]

    def batch(self, indices: Array, length: int, device: torch.device) -> Tensor:
        """Returns the states of some examples in fp32, cut to `length` tokens, [B, length, H]."""
        stored = torch.from_numpy(self._states[indices, :length]).view(self._dtype)
        return stored.to(device).float()


def prefix_states(model: SparseModel, model_key: str, split: Split, config: LocalTraining) -> PrefixStates | None:
    """Opens the states of a split, computing them first if this node has not done so yet.

    Args:
        model: Bound model whose layers below the first MoE layer are frozen.
        model_key: Hash of the frozen weights.
        split: The examples; `split.key` and `model_key`, the stored length and the precision name the entry.
        config: Says the precision, and how much room all entries may take.

    Returns:
        The states, or None where they would not fit.

    Raises:
        ConfigError: A state is too large a number for fp16.
    """
    precision, limit = config.cache_precision, int(config.cache_gib * 2**30)
    root = cache_dir() / "prefix"
    shape = (len(split), split.input_ids.shape[1], model.shape.hidden)
    path = root / model_key[:16] / f"{split.key}.{shape[1]}.{precision}.npy"
    try:
        return PrefixStates(path, precision)
    except FileNotFoundError:
        if not _make_room(root, math.prod(shape) * _DTYPES[precision].itemsize, limit):
            return None
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: processes of several nodes may be filling the same entry of a shared directory.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}{_PARTIAL}")
    try:
        with partial.open("xb") as file:
            # Written, not mapped: the pages of a mapped file count as this process's own while they are dirty.
            header = {"descr": _STORED[precision], "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for states in _computed(model, split, _DTYPES[precision]):
                file.write(states.data)
            # On disk before it has its name; and mapped pages of a file count as this process's own until they are.
            file.flush()
            os.fsync(file.fileno())
        # Mapped before others can see it, and evict it.
        complete = PrefixStates(partial, precision)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return_freed_memory()  # what follows takes room of another kind
    # Others may have filled entries meanwhile, on the strength of the same room.
    _make_room(root, 0, limit)
    return complete


@torch.inference_mode()
def _computed(model: SparseModel, split: Split, dtype: torch.dtype) -> Iterator[Array]:
    """Yields the states of all examples in order, [at most `_CHUNK`, S, H] at a time, as they are stored."""
    for start in range(0, len(split), _CHUNK):
        batch = split.batch(np.arange(start, min(start + _CHUNK, len(split))))
        ids = torch.from_numpy(batch.input_ids).to(model.device)
        mask = torch.from_numpy(batch.attention_mask).to(model.device)
        hidden = model.prefix(ids, mask).to(dtype).cpu()  # [B, S', H]
        if dtype == torch.float16 and not bool(hidden.isfinite().all()):
            raise ConfigError(
                "local.cache_precision: this model's hidden states reach beyond 65504, the largest number of fp16. "
                "Write `cache_precision: bf16`, which has half the size too, or fp32."
            )
        states = hidden.new_zeros(len(hidden), split.input_ids.shape[1], hidden.shape[2])
        states[:, : hidden.shape[1]] = hidden
        yield (states.view(torch.int16) if dtype == torch.bfloat16 else states).numpy()


def _make_room(root: Path, size: int, limit: int) -> bool:
    """Removes the entries used longest ago until `size` bytes more fit; returns whether they do.

    A process that has a removed entry mapped keeps reading it.

    Args:
        root: Directory of all entries.
        size: Bytes of the entry to come.
        limit: Bytes that all entries may take.
    """
    if size > limit:
        return False
    root.mkdir(parents=True, exist_ok=True)
    entries: list[tuple[float, int, Path]] = []
    for file in [*root.rglob("*.npy"), *root.rglob(f"*{_PARTIAL}")]:
        with suppress(FileNotFoundError):  # another process may have removed or renamed it
            stat = file.stat()
            if file.suffix == _PARTIAL and time.time() - stat.st_mtime > _ABANDONED_S:
                file.unlink()
            else:
                entries.append((stat.st_mtime, stat.st_size, file))
    total = sum(taken for _, taken, _ in entries)
    for _, taken, file in sorted(entries):
        if _fits(root, total + size, limit, size):
            return True
        if file.suffix != _PARTIAL:
            file.unlink(missing_ok=True)
            total -= taken
    return _fits(root, total + size, limit, size)


def _fits(root: Path, total: int, limit: int, size: int) -> bool:
    return total <= limit and size <= shutil.disk_usage(root).free
