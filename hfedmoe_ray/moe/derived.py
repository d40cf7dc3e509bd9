"""Experts that are made from published ones before they travel: merged, and in 8 or 4 bits.

The server makes them once per version and client plans refer to them, so a client fetches and holds only the result.
Both executors call these functions, in plain NumPy on one thread, so their bits cannot differ.

In 8 bits a matrix NAME is NAME.int8 and NAME.scale, one fp32 scale per row of the stored matrix, as in `quantised`; in
4 bits NAME.int4, two numbers a byte, and NAME.scale. Biases stay NAME, in fp32.
"""

import math
from collections.abc import Mapping

import numpy as np

from hfedmoe_ray.types import Array, Bits, ExpertKey, ExpertPlan, MergedExpert, Role

SCALE = "scale"
LARGEST: Mapping[Bits, int] = {"int8": 127, "int4": 7}
"""The largest number of each form."""


def merged_expert(merged: MergedExpert, experts: Mapping[ExpertKey, Mapping[str, Array]]) -> dict[str, Array]:
    """Returns W = sum of alpha_e W_e over sum of alpha_e for each named tensor, biases too (Flux, arXiv 2508.19078).

    The sum is folded in float64, in the order of the members, and rounded once: identical experts merge into
    themselves within one rounding of fp32.
    """
    shares = dict(zip(merged.keys, merged.shares, strict=True))
    first = experts[merged.keys[0]]
    result = {}
    for name, array in first.items():
        total = np.zeros(array.shape)
        for key, share in shares.items():
            total += share * experts[key][name].astype(np.float64)
        result[name] = total.astype(array.dtype)
    return result


def quantised_expert(arrays: Mapping[str, Array], form: Bits) -> dict[str, Array]:
    """Returns one expert in few bits: round(q W / max |W|) per row, q = 127 or 7; a row of zeros has scale 0."""
    result: dict[str, Array] = {}
    for name, array in arrays.items():
        if array.ndim == 1:
            result[name] = array
            continue
        scale = (np.abs(array).max(axis=1, keepdims=True) / np.float32(LARGEST[form])).astype(np.float32)
        values = np.rint(array / np.where(scale > 0, scale, np.float32(1))).astype(np.int8)
        result[f"{name}.{form}"] = values if form == "int8" else _packed(values)
        result[f"{name}.{SCALE}"] = scale
    return result


def bits_of(plan: ExpertPlan, key: ExpertKey) -> Bits | None:
    """The few bits in which a present expert travels; None where it travels as it is published."""
    frozen = plan.roles[key.layer][key.expert] is Role.FROZEN
    return plan.frozen_as if frozen and plan.frozen_as != "exact" else None


def quantised_shapes(shapes: Mapping[str, tuple[int, ...]], form: Bits) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of what `quantised_expert` makes of arrays of some shapes."""
    result: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            result[name] = shape
        else:
            rows, columns = shape
            result |= {f"{name}.{form}": (rows, columns if form == "int8" else (columns + 1) // 2)}
            result |= {f"{name}.{SCALE}": (rows, 1)}
    return result


def quantised_bytes(arrays: Mapping[str, Array], form: Bits) -> int:
    """Returns the bytes of one expert in few bits."""
    shapes = quantised_shapes({name: array.shape for name, array in arrays.items()}, form)
    return sum(math.prod(shape) * (1 if name.endswith(f".{form}") else 4) for name, shape in shapes.items())


def _packed(values: Array) -> Array:
    """Two numbers from -7 to 7 a byte, the earlier one in the low half, each plus 8: [rows, columns / 2]."""
    even = np.pad(values, ((0, 0), (0, values.shape[1] % 2)))
    halves = (even + 8).astype(np.uint8)
    packed: Array = halves[:, ::2] | (halves[:, 1::2] << 4)
    return packed
