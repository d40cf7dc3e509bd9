"""Experts that are made from published ones before they travel: merged, and in 8 bits.

The server makes them once per version and client plans refer to them, so a client fetches and holds only the result.
Both executors call these functions, in plain NumPy on one thread, so their bits cannot differ.

In 8 bits a matrix NAME is NAME.int8 and NAME.scale, one fp32 scale per row of the stored matrix, as in `quantised`;
biases stay NAME, in fp32.
"""

from collections.abc import Mapping

import numpy as np

from hfedmoe_ray.types import Array, ExpertKey, ExpertPlan, MergedExpert, Role

INT8, SCALE = "int8", "scale"


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


def int8_expert(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Returns one expert in 8 bits: round(127 W / max |W|) per row; a row of zeros has scale 0."""
    result: dict[str, Array] = {}
    for name, array in arrays.items():
        if array.ndim == 1:
            result[name] = array
            continue
        scale = (np.abs(array).max(axis=1, keepdims=True) / np.float32(127)).astype(np.float32)
        result[f"{name}.{INT8}"] = np.rint(array / np.where(scale > 0, scale, np.float32(1))).astype(np.int8)
        result[f"{name}.{SCALE}"] = scale
    return result


def in_8_bits(plan: ExpertPlan, key: ExpertKey) -> bool:
    """Whether a present expert travels in 8 bits."""
    return plan.frozen_as == "int8" and plan.roles[key.layer][key.expert] is Role.FROZEN


def int8_bytes(arrays: Mapping[str, Array]) -> int:
    """Returns the bytes of one expert in 8 bits."""
    return sum(a.nbytes if a.ndim == 1 else a.size + 4 * len(a) for a in arrays.values())
