"""Hidden states below the first trainable layer, computed once per client and kept on its node.

Where the lower layers are frozen, what they compute for an example never changes. The states are written once, in
fp32 and in a canonical order of batches, so that steps with and without the cache agree to the last bit with any
later step that reads it, in whichever process. They never leave the node.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hfedmoe_ray.context import cache_dir
from hfedmoe_ray.data.dataset import Split
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.types import Array

_CHUNK = 64
"""Examples per forward pass while filling: fixed, because the batch shape decides the last bits."""
_MAX_BYTES = 8 * 2**30
"""Oldest entries are evicted beyond this."""


class PrefixStates:
    """The states of one split, [N, S, H] float32, memory-mapped."""

    def __init__(self, states: Array) -> None:
        """Wraps a mapped array."""
        self._states = states

    def batch(self, indices: Array, length: int, device: torch.device) -> Tensor:
        """Returns the states of some examples, cut to `length` tokens, [B, length, H]."""
        return torch.from_numpy(self._states[indices, :length]).to(device)


def prefix_states(model: SparseModel, model_key: str, split: Split) -> PrefixStates:
    """Opens the states of a split, computing them first if this node has not done so yet.

    Args:
        model: Bound model whose layers below the first MoE layer are frozen.
        model_key: Hash of the frozen weights.
        split: The examples; `split.key` and `model_key` name the entry.
    """
    root = cache_dir() / "prefix"
    path = root / model_key[:16] / f"{split.key}.npy"
    if not path.exists():
        _write(path, model, split)
        _evict(root, keep=path)
    # Reading marks the entry as recently used.
    os.utime(path)
    return PrefixStates(np.load(path, mmap_mode="r"))


def _write(path: Path, model: SparseModel, split: Split) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    shape = (len(split), split.input_ids.shape[1], model.shape.hidden)
    states = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
    with torch.inference_mode():
        for start in range(0, len(split), _CHUNK):
            batch = split.batch(np.arange(start, min(start + _CHUNK, len(split))))
            ids = torch.from_numpy(batch.input_ids).to(model.device)
            mask = torch.from_numpy(batch.attention_mask).to(model.device)
            hidden = model.prefix(ids, mask)  # [B, S', H]
            states[start : start + _CHUNK, : hidden.shape[1]] = hidden.float().cpu().numpy()
    states.flush()
    partial.replace(path)


def _evict(root: Path, keep: Path) -> None:
    """Removes the entries used longest ago until the rest fit; a process that has one mapped keeps reading it."""
    entries = sorted(((file.stat(), file) for file in root.rglob("*.npy")), key=lambda entry: entry[0].st_mtime)
    total = sum(stat.st_size for stat, _ in entries)
    free = shutil.disk_usage(root).free
    for stat, file in entries:
        if total <= _MAX_BYTES and free > stat.st_size:
            break
        if file != keep:
            file.unlink(missing_ok=True)
            total -= stat.st_size
            free += stat.st_size
