"""Real numbers as numbers of a ring, so that sums are exact and do not depend on an order.

With n clients a number is written as the integer round(value * 2^f), at most L = (2^(bits-1) - 1) // n in size:
whatever they send, the sum of n of them is smaller than 2^(bits-1), so it never wraps. f is the largest with which
`bound` still fits, so a number errs by half of 2^-f at most and their sum by n times that. What exceeds the bound is
clipped, and counted.
"""

import math
from dataclasses import dataclass

import numpy as np

from hfedmoe_ray.trust.secure.masks import Ring, ring_dtype
from hfedmoe_ray.types import Array, FloatArray


@dataclass(frozen=True, kw_only=True)
class FixedPoint:
    """How numbers of one kind are written."""

    ring: Ring
    clients: int
    """n: most that are added up."""
    bound: float
    """Largest value that is not clipped."""

    @property
    def limit(self) -> int:
        """L: the largest integer a client sends."""
        return ((1 << (self.ring - 1)) - 1) // self.clients

    @property
    def exponent(self) -> int:
        """f; negative where even integers are too fine for the ring."""
        return math.floor(math.log2(self.limit / self.bound))

    @property
    def step(self) -> float:
        """2^-f: what two neighbouring numbers differ by."""
        return 2.0**-self.exponent

    def encode(self, values: Array) -> tuple[Array, int]:
        """Returns numbers of the ring, and how many values were clipped.

        Raises:
            ValueError: A value is not finite.
        """
        if not np.isfinite(values).all():
            raise ValueError("numbers that are not finite cannot be added up")
        wide = values.astype(np.float64)
        clipped = int(np.count_nonzero(np.abs(wide) > self.bound))
        np.clip(wide, -self.bound, self.bound, out=wide)
        np.ldexp(wide, self.exponent, out=wide)
        np.rint(wide, out=wide)
        # Rounding, here and of L itself, may have made one of the largest larger than L.
        whole = np.clip(wide.astype(np.int64), -self.limit, self.limit)
        return whole.astype(ring_dtype(self.ring)), clipped

    def decode(self, total: Array) -> FloatArray:
        """Returns the sum that numbers of the ring stand for."""
        signed = total.view(f"<i{self.ring // 8}")
        return np.ldexp(signed.astype(np.float64), -self.exponent)
