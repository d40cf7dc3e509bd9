"""What the round loop asks of whoever runs the clients: one process, or a cluster."""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Protocol

from hfedmoe_ray.records import NodeUsage
from hfedmoe_ray.types import ClientTask, TaskResult, Weights

Notify = Callable[[str, Mapping[str, Any]], None]
"""Told (event name, fields) as things happen: task_started, task_finished, task_retried, slot_lost, ..."""
Further = Callable[[], Sequence[ClientTask]]
"""Asked, whenever a result has been taken, for tasks that are to run as well."""


def nothing_further() -> Sequence[ClientTask]:
    """No further tasks."""
    return ()


class Executor(Protocol):
    """Runs tasks. Results depend on the tasks and the published weights alone, never on order, mode or slot count."""

    runs_elsewhere: bool
    """Whether tasks run in other processes, so that `run` may be consumed in a thread beside the caller's."""
    has_gpus: bool
    """Whether clients whose tier does not say otherwise compute on GPUs."""

    def publish(self, weights: Weights, keep: frozenset[int] = frozenset()) -> None:
        """Makes a version of the weights available to all later tasks (arrays may be shared, never written).

        Of those before it the last is kept, and those that `keep` names.
        """

    def run(
        self, tasks: Sequence[ClientTask], notify: Notify, further: Further = nothing_further
    ) -> Generator[TaskResult, None, None]:
        """Runs the tasks, yielding each result once as it completes, in any order; every task yields exactly one.

        A task whose process dies is tried again elsewhere; one that outlasts the deadline is "late"; an exception in
        client code is "failed" with its last line as reason. Closing the iterator early stops what still runs.
        """

    def usage(self) -> tuple[NodeUsage, ...]:
        """How busy the machines were since it was last asked; never waits long for one that does not answer."""

    def close(self) -> None:
        """Releases every process and object; never blocks on a hanging client."""
