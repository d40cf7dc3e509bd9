"""What the clients of one tier did, on average: the rows every destination shows."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hfedmoe_ray.records import ClientRecord


@dataclass(frozen=True, kw_only=True)
class TierStatistics:
    """Means over one tier's results whose status is "ok" (a client that failed neither sent nor measured anything)."""

    tier: str
    clients: int
    """Different clients that were asked."""
    statuses: Mapping[str, int]
    """Results by status, all counted."""
    loss: float | None
    """Mean training loss."""
    resident: float
    """Experts held."""
    trained: float
    """Experts that took an optimizer step."""
    bytes_up: float
    bytes_down: float
    seconds: float
    peak_mib: float
    """The largest, not the mean."""


def by_tier(results: Iterable[ClientRecord], order: Sequence[str] = ()) -> dict[str, TierStatistics]:
    """Groups results by tier: first the tiers of `order` that have any, then others as they appear."""
    groups: dict[str, list[ClientRecord]] = {tier: [] for tier in order}
    for result in results:
        groups.setdefault(result.tier, []).append(result)
    return {tier: _statistics(tier, group) for tier, group in groups.items() if group}


def _statistics(tier: str, results: Sequence[ClientRecord]) -> TierStatistics:
    complete = [result for result in results if result.status == "ok"]
    losses = [result.loss for result in complete if result.loss is not None]
    return TierStatistics(
        tier=tier,
        clients=len({result.client for result in results}),
        statuses=Counter(result.status for result in results),
        loss=mean(losses) if losses else None,
        resident=mean([result.resident for result in complete]),
        trained=mean([result.trained for result in complete]),
        bytes_up=mean([result.bytes_up for result in complete]),
        bytes_down=mean([result.bytes_down for result in complete]),
        seconds=mean([result.seconds for result in complete]),
        peak_mib=max((result.peak_mib for result in complete), default=0.0),
    )


def mean(values: Sequence[float]) -> float:
    """The mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0
