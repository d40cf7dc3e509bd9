"""What several sections of a report need to say or to look up."""

from collections.abc import Mapping

from hfedmoe_ray.records import ClientRecord, RoundReport
from hfedmoe_ray.tracking.formatting import MISSING
from hfedmoe_ray.tracking.markup import key
from hfedmoe_ray.tracking.record import RunRecord
from hfedmoe_ray.types import ExpertKey

STATUSES = ("ok", "late", "failed", "memory", "rejected", "dropped")
"""How a task can end, in the order in which it is told."""


def trained_experts(report: RoundReport) -> list[ExpertKey]:
    """Experts that at least one client trained in a round."""
    return [
        ExpertKey(layer, expert)
        for layer, row in enumerate(report.selected)
        for expert, count in enumerate(row)
        if count
    ]


def trains(report: RoundReport) -> bool:
    """Whether anybody trained anything in a round."""
    return any(map(any, report.selected))


def training(run: RunRecord) -> list[ClientRecord]:
    """Results of rounds in which clients train: profiling passes hold every expert, and say nothing about budgets."""
    rounds = {report.round for report in run.rounds if trains(report)}
    return [result for result in run.results if result.round in rounds]


def tier_key(run: RunRecord, tier: str) -> str:
    """HTML: a tier's name beside its colour."""
    return key(tier, group(run, tier)) if tier else MISSING


def group(run: RunRecord, tier: str) -> int:
    """The colour of a tier: its place in the configuration."""
    return run.tiers.index(tier) if tier in run.tiers else 0


def told(statuses: Mapping[str, int]) -> str:
    """{"ok": 7, "late": 1} -> "7 ok, 1 late"."""
    return ", ".join(f"{count} {status}" for status, count in statuses.items() if count) or MISSING


def accuracies(run: RunRecord, name: str = "own") -> dict[int, float]:
    """Accuracy on their own test data of the clients that measured it, "own" or "personalised"."""
    return {int(client): value for client, value in (run.summary.get(f"{name}_accuracy_by_client") or {}).items()}
