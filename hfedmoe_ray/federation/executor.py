"""What the round loop asks of whoever runs the clients: one process, or a cluster."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from hfedmoe_ray.types import Array, ClientTask, ExpertKey, TaskResult

Notify = Callable[[str, Mapping[str, Any]], None]
"""Told (event name, fields) as things happen: task_started, task_finished, task_retried, slot_lost, ..."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One version of the global model as it is published: what trains, never the frozen base."""

    version: int
    shared: Mapping[str, Array]
    """Routers and trainable shared parameters, by full parameter name."""
    experts: Mapping[ExpertKey, Mapping[str, Array]]
    means: Array | None = None
    """Mean output of every expert over the tokens routed to it, [L, E, H]."""
    personal: Mapping[int, "PersonalWeights"] | None = None
    """Private weights of clients, laid over the global ones when a task asks for them (`ClientTask.personal`)."""


@dataclass(frozen=True, kw_only=True)
class PersonalWeights:
    """What one client keeps to itself."""

    shared: Mapping[str, Array]
    experts: Mapping[ExpertKey, Mapping[str, Array]]


class Executor(Protocol):
    """Runs tasks. Results depend on the tasks and the published weights alone, never on order, mode or slot count."""

    def publish(self, weights: Weights) -> None:
        """Makes a version of the weights available to all later tasks (arrays may be shared, never written)."""

    def run(self, tasks: Sequence[ClientTask], notify: Notify) -> Iterator[TaskResult]:
        """Runs the tasks, yielding each result once as it completes, in any order; every task yields exactly one.

        A task whose process dies is tried again elsewhere; one that outlasts the deadline is "late"; an exception in
        client code is "failed" with its last line as reason. Closing the iterator early stops what still runs.
        """

    def close(self) -> None:
        """Releases every process and object; never blocks on a hanging client."""
