"""Means over seeds with their 95 % intervals, and the values behind them."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean and its 95 % interval (`comparison.statistics.estimate`); of one value, the interval is that value."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of at least one value."""
    # Imported here: this brings scipy, which listing the studies does not wait for.
    from hfedmoe_ray.comparison.statistics import estimate

    found = estimate(values)
    if found is None:
        raise ValueError("there is no mean of nothing")
    half = found.half_width or 0.0
    return Mean(mean=found.mean, low=found.mean - half, high=found.mean + half, values=tuple(values))
