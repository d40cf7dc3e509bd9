"""Averaging low-rank factors: the mean of products B A, exactly, brought back to the rank of one product.

Averaging A and B each by itself is another thing: mean(B) mean(A) holds products of one client's B with another's A.
Here the factors are stacked: the weighted mean of n products is [w_1 B_1 .. w_n B_n] [A_1; ..; A_n], of rank n r. Its
best approximation of rank r is its truncated SVD (Eckart and Young), which by way of the QR of both stacks takes no
matrix larger than they are. FlexLoRA (arXiv 2402.11505) averages like this; the scale of the new factors is ours.

One thread computes: how many there are decides the last bits of a factorisation, and no result may depend on it.

Legend: r rank, k stacked rank.
"""

from collections.abc import Iterable
from functools import cache
from math import sqrt

import numpy as np
from threadpoolctl import ThreadpoolController

from hfedmoe_ray.types import LORA_A, LORA_B, Array, FloatArray

_ROW_NORM = 1 / sqrt(3.0)
"""Norm of a row of A as it was first drawn, U(-1/sqrt(in), 1/sqrt(in)): the new A gets rows of this norm."""


def factor_pairs(names: Iterable[str]) -> dict[str, str]:
    """Returns the names of factors A among tensor names, each with the name of its B."""
    known = set(names)
    partners = {name: name.replace(f".{LORA_A}", f".{LORA_B}") for name in known if f".{LORA_A}" in name}
    return {a: b for a, b in sorted(partners.items()) if b in known}


class ProductMean:
    """The weighted mean of products B A, folded one client at a time, in order.

    Holds the stacked factors while they are thin; once their rank reaches a side of the matrix, the matrix itself is
    the smaller of the two and holds what came so far. Memory is bounded by that, whatever the cohort.
    """

    def __init__(self) -> None:
        """Starts empty."""
        self._stack: list[tuple[Array, Array, float]] = []
        self._rank = 0
        self._dense: FloatArray | None = None  # [out, in]
        self._weight = 0.0

    def add(self, a: Array, b: Array, weight: float) -> None:
        """Folds the product of `a` [r, in] and `b` [out, r]; a weight of 0 leaves it out."""
        if weight <= 0.0:
            return
        self._stack.append((a.copy(), b.copy(), weight))
        self._weight += weight
        self._rank += len(a)
        if self._rank >= min(a.shape[1], b.shape[0]) and len(self._stack) > 1:
            with _threads().limit(limits=1):
                self._dense = self._sum()
            self._stack, self._rank = [], 0

    def mean(self) -> FloatArray:
        """Returns the mean itself, [out, in]. Raises ValueError if nothing was added."""
        if not self._weight:
            raise ValueError("the mean of no products")
        with _threads().limit(limits=1):
            mean: FloatArray = self._sum() / self._weight
        return mean

    def result(self, old_a: Array, old_b: Array) -> tuple[Array, Array]:
        """Returns factors of the best approximation of the mean of the old ones' rank.

        Of a single contributor the factors are what it sent; of none, the old ones. Otherwise A has orthogonal rows,
        also where the mean has a lower rank, so that B can grow there again, and B carries the singular values.

        Args:
            old_a: Factor A before, [r, in].
            old_b: Factor B before, [out, r].
        """
        rank = len(old_a)
        if not self._weight:
            return old_a, old_b
        if self._dense is None and len(self._stack) == 1:
            a, b, _ = self._stack[0]
            return a.astype(old_a.dtype, copy=False), b.astype(old_b.dtype, copy=False)
        with _threads().limit(limits=1):
            left, values, right = self._svd()
        b = left[:, :rank] * (values[:rank] / _ROW_NORM)
        return (right[:rank] * _ROW_NORM).astype(old_a.dtype), b.astype(old_b.dtype)

    def _svd(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """The mean's singular vectors and values: [out, k], [k] and [k, in]."""
        if self._dense is not None:
            left, values, right = np.linalg.svd(self._sum() / self._weight, full_matrices=False)
            return left, values, right
        stacked_b, stacked_a = self._stacked()
        basis_b, core_b = np.linalg.qr(stacked_b / self._weight)
        basis_a, core_a = np.linalg.qr(stacked_a.T)
        left, values, right = np.linalg.svd(core_b @ core_a.T, full_matrices=False)
        return basis_b @ left, values, right @ basis_a.T

    def _stacked(self) -> tuple[FloatArray, FloatArray]:
        """The factors side by side, weighted and in float64: [out, k] and [k, in]."""
        return (
            np.concatenate([b.astype(np.float64) * weight for _, b, weight in self._stack], axis=1),
            np.concatenate([a.astype(np.float64) for a, _, _ in self._stack]),
        )

    def _sum(self) -> FloatArray:
        """The weighted sum so far, [out, in]."""
        if not self._stack:
            assert self._dense is not None
            return self._dense
        stacked_b, stacked_a = self._stacked()
        total: FloatArray = stacked_b @ stacked_a
        return total if self._dense is None else self._dense + total


@cache
def _threads() -> ThreadpoolController:
    """Finds the linear algebra libraries of this process, once."""
    return ThreadpoolController()
