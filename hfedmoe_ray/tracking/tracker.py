"""The one interface through which a run reports; every destination implements it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from hfedmoe_ray.records import RoundReport


class Tracker(Protocol):
    """A destination of a run's reports. None of its calls may stop or slow training."""

    def start(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Called once: the resolved configuration, and facts such as versions, plan and partition."""

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Something happened inside a round (a client finished, was retried, was rejected)."""

    def round(self, report: RoundReport) -> None:
        """A round is complete."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run is complete, or has stopped with `summary["error"]`."""


class Trackers:
    """Several trackers as one, called in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def start(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """See `Tracker.start`."""
        for tracker in self._trackers:
            tracker.start(config, facts)

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """See `Tracker.event`."""
        for tracker in self._trackers:
            tracker.event(name, fields)

    def round(self, report: RoundReport) -> None:
        """See `Tracker.round`."""
        for tracker in self._trackers:
            tracker.round(report)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """See `Tracker.finish`."""
        for tracker in self._trackers:
            tracker.finish(summary)
