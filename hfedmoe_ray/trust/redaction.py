"""What is told of a run whose model is private: nothing that clients measured, nor who took part.

Accuracy on the server's own test set follows from the published model, and stays. So do sums of bytes, seconds and
outcomes, which are no part of what epsilon covers: traffic is seen on the wire as well.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.records import RoundReport
from hfedmoe_ray.tracking.tracker import Tracker


def as_promised(experiment: Experiment, tracker: Tracker) -> Tracker:
    """Returns a tracker that is told no more than `privacy.central` allows."""
    central = experiment.privacy.central
    redacts = central is not None and central.active and central.record == "redacted"
    return Redacted(tracker) if redacts else tracker


class Redacted:
    """Passes on what does not follow from the clients' data (see `Tracker`)."""

    def __init__(self, tracker: Tracker) -> None:
        """Stands in front of a tracker."""
        self._tracker = tracker

    def start(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Without how many examples each client has, of which classes, and what follows from how long they are."""
        clients = [{**client, "samples": 0} for client in facts["clients"]]
        told = {**facts, "clients": clients, "partition": [], "cut": 0, "predicted_mib": {}}
        self._tracker.start(config, told)

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Unless it is of a client, or tells how many take part."""
        if "client" not in fields:
            self._tracker.event(name, {key: value for key, value in fields.items() if key != "cohort"})

    def round(self, report: RoundReport) -> None:
        """See `redacted`."""
        self._tracker.round(redacted(report))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Without the tiers' memory, which follows from how long texts are."""
        self._tracker.finish({**summary, "memory": {}})


def redacted(report: RoundReport) -> RoundReport:
    """Returns a report without what follows from the clients' data."""
    return replace(
        report,
        loss=None,
        clients=(),
        selected=tuple(tuple(0 for _ in row) for row in report.selected),
        usage=tuple(tuple(0.0 for _ in row) for row in report.usage),
        agreement=None,
        participation=None,
    )
