"""Means with intervals, and paired tests: what few seeds can say, and no more.

The interval is Student's: mean ± t(0.975, n - 1) s / √n. The tests are paired t tests over seeds, because runs with
the same seed share their partition, their cohorts and their starting model; their p values are corrected by Holm's
method (Scandinavian Journal of Statistics 6, 1979) for the number of comparisons with the best.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Literal

from scipy.stats import t, ttest_rel

CONFIDENCE = 0.95
_ROUNDING = 1e-9
Better = Literal["high", "low"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds."""

    mean: float
    half_width: float | None
    """Half of the 95 % interval; None for a single value."""
    n: int


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """One strategy against the best, over the seeds that both have."""

    difference: float
    """Mean difference to the best."""
    p: float
    p_holm: float
    """Corrected for all comparisons with the best."""
    n: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Returns the mean and its interval; None of nothing."""
    if not values:
        return None
    n = len(values)
    if n == 1:
        return Estimate(mean=values[0], half_width=None, n=1)
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(values) / math.sqrt(n)
    return Estimate(mean=mean(values), half_width=half, n=n)


def best_of(values: Mapping[str, Mapping[int, float]], better: Better) -> str | None:
    """Returns which of the strategies with the most seeds has the best mean; the first of equals."""
    most = max((len(by_seed) for by_seed in values.values()), default=0)
    sign = 1 if better == "high" else -1
    complete = [name for name, by_seed in values.items() if most and len(by_seed) == most]
    return max(complete, key=lambda name: sign * mean(values[name].values()), default=None)


def compare_with(best: str, values: Mapping[str, Mapping[int, float]]) -> dict[str, PairedTest]:
    """Tests every other strategy against the best; those that cannot be tested are left out.

    Args:
        best: One of the strategies.
        values: Value by strategy and seed.
    """
    found: dict[str, tuple[float, float, int]] = {}
    for name, by_seed in values.items():
        shared = sorted(by_seed.keys() & values[best].keys())
        if name != best and len(shared) >= 2:
            mine, theirs = [by_seed[seed] for seed in shared], [values[best][seed] for seed in shared]
            if (p := paired_p(mine, theirs)) is not None:
                found[name] = (mean(mine) - mean(theirs), p, len(shared))
    corrected = holm([p for _, p, _ in found.values()])
    return {
        name: PairedTest(difference=difference, p=p, p_holm=p_holm, n=n)
        for (name, (difference, p, n)), p_holm in zip(found.items(), corrected, strict=True)
    }


def paired_p(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Two-sided p of the paired t test; 1 for pairs that are equal.

    None where all differences are the same, within rounding: with few seeds and few test examples that happens by
    chance, and the test would take it for certainty (p = 0).
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if not any(differences):
        return 1.0
    if stdev(differences) <= _ROUNDING * max(map(abs, differences)):
        return None
    return float(ttest_rel(first, second).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p values corrected by Holm's step-down method, in the order given."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = running
    return corrected
