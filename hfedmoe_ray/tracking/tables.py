"""A run's record as rows of plain values, for tables of any kind."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

from hfedmoe_ray.records import RoundReport
from hfedmoe_ray.tracking.record import RunRecord

_NESTED = frozenset({"clients", "selected", "usage", "phases"})
"""Fields of a round that are no single value."""


def round_rows(run: RunRecord) -> list[dict[str, Any]]:
    """A row a round: every single value of a `RoundReport`, and counts of what is nested in it."""
    phases = dict.fromkeys(phase for report in run.rounds for phase in report.phases)
    return [_round_row(report, phases) for report in run.rounds]


def client_rows(run: RunRecord) -> list[dict[str, Any]]:
    """A row for each client's result in each round."""
    return [dataclasses.asdict(result) for result in run.results]


def _round_row(report: RoundReport, phases: Mapping[str, None]) -> dict[str, Any]:
    single = {one.name: getattr(report, one.name) for one in dataclasses.fields(report) if one.name not in _NESTED}
    statuses = Counter(client.status for client in report.clients)
    return {
        **single,
        "experts_trained": sum(count > 0 for layer in report.selected for count in layer),
        "clients_ok": statuses["ok"],
        "clients_lost": statuses.total() - statuses["ok"],
        **{f"seconds_{phase}": report.phases.get(phase) for phase in phases},
    }
