"""Means over seeds with their 95 % intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean and its 95 % interval by Student's t; of one value, the interval is that value."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]


def mean_of(values: Sequence[float]) -> Mean:
    """The mean of at least one value."""
    from scipy.stats import t

    centre = fmean(values)
    half = float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return Mean(mean=centre, low=centre - half, high=centre + half, values=tuple(values))
