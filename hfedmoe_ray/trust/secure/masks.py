"""Masks: a secret stretched to uniform elements of the ring of 2^32 or 2^64 (AES-256 in counter mode)."""

from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR

from hfedmoe_ray.types import Array

Ring = Literal[32, 64]
"""Bits of a number of the ring."""
_CHUNK = 1 << 20
"""Bytes at a time, small enough for a processor's cache."""
_ZEROS = bytes(_CHUNK)


def ring_dtype(ring: Ring) -> np.dtype[np.unsignedinteger[np.typing.NBitBase]]:
    """Returns the type of a number of the ring; little-endian on every machine."""
    return np.dtype(f"<u{ring // 8}")


def add_mask(values: Array, key: bytes, block: int, sign: Literal[1, -1]) -> None:
    """Adds the mask of a key to a block's numbers, or subtracts it, in place.

    Args:
        values: Contiguous numbers of the ring.
        key: 32 bytes.
        block: Number of the block: each has a stretch of its own of the key's stream (2^64 times 16 bytes).
        sign: 1 adds, -1 subtracts.
    """
    stream = Cipher(AES256(key), CTR(block.to_bytes(8, "big") + bytes(8))).encryptor()
    buffer = bytearray(_CHUNK + 15)
    step = _CHUNK // values.itemsize
    fold = np.add if sign == 1 else np.subtract
    for start in range(0, len(values), step):
        part = values[start : start + step]
        stream.update_into(memoryview(_ZEROS)[: part.nbytes], buffer)
        fold(part, np.frombuffer(buffer, dtype=values.dtype, count=len(part)), out=part)
