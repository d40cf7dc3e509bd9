"""What W&B has no chart type for: the heat map of expert selection, and the clients' budgets.

Each is logged as what it is and as a table to query. A run logs at most some `MOST` of each, evenly over its rounds,
and none is larger than it can be looked at.
"""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from hfedmoe_ray.records import RoundReport
from hfedmoe_ray.tracking.charts import scale
from hfedmoe_ray.tracking.formatting import plural
from hfedmoe_ray.tracking.sections import selection_map

MOST = 50
"""Rounds of a run that have pictures."""
ROWS = 1000
"""Rows of a table: of experts those that most clients trained, of clients those that failed first."""
CELLS = 2048
"""Experts of all layers that are drawn as a heat map (some 300 KiB); a larger model has the table alone."""


class Pictures:
    """Makes W&B's pictures and tables of rounds."""

    def __init__(self, rounds: int, clients: Sequence[Mapping[str, Any]]) -> None:
        """Args: rounds of the run, and the facts told of its clients."""
        self._rounds = rounds
        self._stride = -(-rounds // MOST)
        self._budgets = {client["client"]: client.get("resident_experts") for client in clients}

    def of(self, report: RoundReport) -> dict[str, Any]:
        """The pictures of a round, by W&B's names; of most rounds of a long run, none."""
        if report.round % self._stride and report.round != self._rounds:
            return {}
        import wandb

        pictures: dict[str, Any] = {
            "experts/selection": wandb.Table(columns=["layer", "expert", "clients", "usage"], data=_selection(report)),
            "clients/budgets": wandb.Table(
                columns=["client", "tier", "budget", "held", "trained", "status"], data=self._clients(report)
            ),
        }
        if sum(map(len, report.selected)) <= CELLS:
            peak = max([1, *(count for layer in report.selected for count in layer)])
            drawing = scale("1", plural(peak, "client")) + selection_map(report.selected, peak, f"round {report.round}")
            pictures["experts/heatmap"] = wandb.Html(_page(drawing), inject=False)
        return pictures

    def _clients(self, report: RoundReport) -> list[list[Any]]:
        shown = sorted(report.clients, key=lambda client: (client.status == "ok", client.client))[:ROWS]
        return [
            [one.client, one.tier, self._budgets.get(one.client), one.resident, one.trained, one.status]
            for one in sorted(shown, key=lambda client: client.client)
        ]


def _selection(report: RoundReport) -> list[list[Any]]:
    rows = [
        [layer, expert, count, report.usage[layer][expert]]
        for layer, counts in enumerate(report.selected)
        for expert, count in enumerate(counts)
    ]
    return sorted(sorted(rows, key=lambda row: -row[2])[:ROWS])


def _page(drawing: str) -> str:
    style = files("hfedmoe_ray.tracking").joinpath("report.css").read_text(encoding="utf-8")
    style += "body { padding: .5rem }"
    return f'<!doctype html><meta charset="utf-8"><style>{style}</style><figure>{drawing}</figure>'
