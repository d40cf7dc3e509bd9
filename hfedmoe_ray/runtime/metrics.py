"""A run's numbers as Ray metrics, which Ray serves on every node's metrics port in Prometheus' format.

`cluster/grafana/hfedmoe.json` draws them. Ray puts `ray_` before every name, and adds the session and the node; a run
is told apart by its label `run`. Ray forgets a gauge that was not set for two of its export intervals (of ten seconds),
and a round may take longer: so a thread sets them again and again.
"""

import threading
from collections import Counter as Count
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

from hfedmoe_ray.records import RoundReport

REPEAT_S = 1.0
"""Between two times that the gauges are set."""
GAUGES = {
    "hfedmoe_rounds": "Rounds the run is to have",
    "hfedmoe_round": "Last complete round",
    "hfedmoe_round_seconds": "Duration of the last round",
    "hfedmoe_accuracy": "Accuracy of the global model on the global test split",
    "hfedmoe_own_accuracy": "Mean accuracy of the clients on their own test splits",
    "hfedmoe_loss": "Mean training loss of the clients of the last round",
    "hfedmoe_clients_running": "Clients at work",
}
COUNTERS = {
    "hfedmoe_bytes_up_total": "Bytes that clients sent",
    "hfedmoe_bytes_down_total": "Bytes that clients fetched",
    "hfedmoe_retries_total": "Tasks tried again because their process died",
}
PHASE_SECONDS = "hfedmoe_phase_seconds"
"""Gauge, by phase: where the last round's seconds went."""
CLIENTS = "hfedmoe_clients_total"
"""Counter, by tier and status: results of clients."""


class RayMetrics:
    """Tells Ray's metrics agent of a run (see `Tracker`). Every call only notes numbers in this process."""

    def __init__(self, run: str) -> None:
        """Registers the metrics under the run's name."""
        self._labels = {"run": run}
        self._gauges = {name: Gauge(name, text, ("run",)) for name, text in GAUGES.items()}
        self._counters = {name: Counter(name, text, ("run",)) for name, text in COUNTERS.items()}
        self._phases = Gauge(PHASE_SECONDS, "Seconds of the last round, by phase", ("run", "phase"))
        self._clients = Counter(CLIENTS, "Results of clients, by tier and status", ("run", "tier", "status"))
        self._values: dict[tuple[str, str], float] = {}
        """Values of gauges by (name, phase); no phase is empty."""
        self._ended = threading.Event()
        self._running: set[tuple[int, str, int]] = set()
        """(round, kind, client) of the tasks that have been started and not finished."""

    def start(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Tells how many rounds there are to be."""
        del facts
        self._set("hfedmoe_rounds", config["rounds"])
        threading.Thread(target=self._repeat, name="ray-metrics", daemon=True).start()

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Counts the clients at work, and those that are tried again."""
        if name == "task_retried":
            self._add("hfedmoe_retries_total", 1)
        elif name in ("task_started", "task_finished"):
            task = (fields["round"], fields["kind"], fields["client"])
            (self._running.add if name == "task_started" else self._running.discard)(task)
            self._set("hfedmoe_clients_running", len({client for _, _, client in self._running}))

    def round(self, report: RoundReport) -> None:
        """Tells of a round."""
        # A round that had enough updates left some of its tasks unfinished.
        self._running = {task for task in self._running if task[0] >= report.round}
        self._set("hfedmoe_round", report.round)
        self._set("hfedmoe_round_seconds", report.seconds)
        self._set("hfedmoe_accuracy", report.accuracy)
        self._set("hfedmoe_own_accuracy", report.own_accuracy)
        self._set("hfedmoe_loss", report.loss)
        self._add("hfedmoe_bytes_up_total", report.bytes_up)
        self._add("hfedmoe_bytes_down_total", report.bytes_down)
        for phase, seconds in report.phases.items():
            self._set(PHASE_SECONDS, seconds, phase)
        for (tier, status), count in Count((one.tier, one.status) for one in report.clients).items():
            self._clients.inc(count, self._labels | {"tier": tier, "status": status})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Sets the gauges a last time; Ray forgets them some twenty seconds later."""
        del summary
        self._ended.set()
        self._show_all()

    def _set(self, name: str, value: float | None, phase: str = "") -> None:
        if value is not None:
            self._values[name, phase] = value
            self._show(name, value, phase)

    def _show(self, name: str, value: float, phase: str) -> None:
        if phase:
            self._phases.set(value, self._labels | {"phase": phase})
        else:
            self._gauges[name].set(value, self._labels)

    def _repeat(self) -> None:
        while not self._ended.wait(REPEAT_S):
            self._show_all()

    def _show_all(self) -> None:
        for (name, phase), value in list(self._values.items()):
            self._show(name, value, phase)

    def _add(self, name: str, value: float) -> None:
        if value:
            self._counters[name].inc(value, self._labels)
