"""Where the random numbers of privacy come from: a secret of the operating system, stretched by ChaCha20.

A run's own seed stands in its configuration, and who knows it could draw the same noise and subtract it. So nothing
here derives from it, nothing is kept, and numbers drawn again are others. What floats can hold of Gaussian noise is
not every number (Mironov 2012); against an attacker who looks at the last bits of a weight nothing here helps.
"""

import secrets
from typing import Protocol

import numpy as np

from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.types import FloatArray

_AT_ONCE = 1 << 20


class Source(Protocol):
    """Draws numbers; a `numpy.random.Generator` is one."""

    def random(self, size: int) -> FloatArray:
        """Returns numbers that are uniform in [0, 1), [size]."""

    def standard_normal(self, size: int) -> FloatArray:
        """Returns numbers of mean 0 and variance 1, [size]."""


class SecretSource:
    """Numbers that nobody can draw again."""

    def __init__(self) -> None:
        """Takes 256 bits of entropy.

        Raises:
            ConfigError: The extra `privacy` is not installed.
        """
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher
            from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
        except ImportError as missing:
            raise ConfigError(needs_extra(missing)) from missing
        key, nonce = secrets.token_bytes(32), bytes(16)  # a key is used once
        self._stream = Cipher(ChaCha20(key, nonce), mode=None).encryptor()

    def random(self, size: int) -> FloatArray:
        """See `Source`: of 53 bits."""
        words = np.frombuffer(self._stream.update(bytes(8 * size)), dtype="<u8")
        uniform: FloatArray = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return uniform

    def standard_normal(self, size: int) -> FloatArray:
        """See `Source`: by Box and Muller, a part at a time."""
        normal = np.empty(size + size % 2)
        for start in range(0, len(normal), _AT_ONCE):
            part = normal[start : start + _AT_ONCE]
            half = len(part) // 2
            radius = np.sqrt(-2.0 * np.log1p(-self.random(half)))  # of (0, 1]
            angle = 2.0 * np.pi * self.random(half)
            part[:half], part[half:] = radius * np.cos(angle), radius * np.sin(angle)
        return normal[:size]


def source(seed: int | None, purpose: str, *parts: int) -> Source:
    """Returns a secret source; with a seed, for tests, one that is a function of it, of a purpose and of integers."""
    return SecretSource() if seed is None else generator(seed, purpose, *parts)


def needs_extra(missing: ImportError) -> str:
    """What to do where a library of the extra is missing."""
    return (
        f"the section `privacy` needs a library that is not installed ({missing}): pip install 'hfedmoe_ray[privacy]'"
    )
