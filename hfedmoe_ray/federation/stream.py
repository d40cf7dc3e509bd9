"""An executor whose runs overlap: tasks can be given to it at any time, and their results taken in any order."""

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

from hfedmoe_ray.federation.executor import Executor, Further, Notify, nothing_further
from hfedmoe_ray.records import NodeUsage
from hfedmoe_ray.types import ClientTask, TaskResult, Weights

_About = tuple[str | None, int | None, int | None]
"""(kind, round, client): what events say of a task. Tasks of which the same is said have the same listener."""
_Results = dict[int, TaskResult]
"""By the identity of their tasks."""


class Stream:
    """Feeds one run of the executor behind it with the tasks of many (see `Executor`).

    It is used from one thread at a time; only `publish` may be called from another while a run is consumed.
    """

    def __init__(self, executor: Executor, notify: Notify) -> None:
        """Wraps an executor, which the caller closes; `notify` is told what concerns no task in particular."""
        self.runs_elsewhere, self.has_gpus = executor.runs_elsewhere, executor.has_gpus
        self._executor = executor
        self._notify = notify
        self._queued: list[ClientTask] = []
        """Not yet given to the executor."""
        self._pending: dict[int, tuple[ClientTask, _Results]] = {}
        """Tasks without a result, by identity, and where that goes."""
        self._listeners: dict[_About, list[Notify]] = {}
        """Of the tasks without a result: one for each."""
        self._results: _Results = {}
        """Of tasks that were submitted: those that nobody has taken yet."""
        self._running: Generator[TaskResult, None, None] | None = None
        self._otherwise = notify
        """Told what concerns no task while a result is waited for."""

    def publish(self, weights: Weights, keep: frozenset[int] = frozenset()) -> None:
        """See `Executor.publish`; versions that tasks without a result start from are kept too."""
        self._executor.publish(weights, keep | {task.version for task, _ in list(self._pending.values())})

    def submit(self, tasks: Sequence[ClientTask], notify: Notify) -> None:
        """Takes on tasks; they start, at the latest, when a result is waited for."""
        self._take_on(tasks, notify, self._results)

    def result(self, task: ClientTask) -> TaskResult:
        """Returns the result of a task that was submitted, once, when it is there."""
        while id(task) not in self._results:
            self._wait(self._notify)
        return self._results.pop(id(task))

    def run(
        self, tasks: Sequence[ClientTask], notify: Notify, further: Further = nothing_further
    ) -> Generator[TaskResult, None, None]:
        """See `Executor.run`. Where closing it early stops tasks, all others under way begin again."""
        left: dict[int, ClientTask] = {}
        arrived: _Results = {}

        def take_on(more: Sequence[ClientTask]) -> None:
            left.update((id(task), task) for task in more)
            self._take_on(more, notify, arrived)

        take_on(tasks)
        try:
            while left:
                while not arrived:
                    self._wait(notify)
                task, result = arrived.popitem()
                del left[task]
                yield result
                take_on(further())
        finally:
            if left:
                self._withdraw(left.values())

    def usage(self) -> tuple[NodeUsage, ...]:
        """See `Executor.usage`."""
        return self._executor.usage()

    def close(self) -> None:
        """Stops what still runs and forgets it; the executor can be used on."""
        self._stop()
        self._queued.clear()
        self._pending.clear()
        self._listeners.clear()
        self._results.clear()

    def _take_on(self, tasks: Sequence[ClientTask], notify: Notify, results: _Results) -> None:
        self._queued += tasks
        for task in tasks:
            self._pending[id(task)] = (task, results)
            self._listeners.setdefault(_about(task), []).append(notify)

    def _wait(self, otherwise: Notify) -> None:
        """Waits for one more result, and puts it where it goes."""
        if self._running is None:
            self._running = self._executor.run(self._take_queued(), self._tell, self._take_queued)
        self._otherwise = otherwise
        result = next(self._running, None)
        if result is None:
            self._running = None  # it had no tasks left, and was over before these were queued
        else:
            self._forget(result.task)[id(result.task)] = result
            if not self._pending:
                self._stop()  # with its last task a run is over, whatever comes next

    def _withdraw(self, tasks: Iterable[ClientTask]) -> None:
        """Stops tasks that nobody waits for any more."""
        self._stop()
        for task in tasks:
            if id(task) in self._pending:
                self._forget(task)
        self._queued = [task for task, _ in self._pending.values()]

    def _stop(self) -> None:
        if self._running is not None:
            self._running.close()
        self._running = None

    def _forget(self, task: ClientTask) -> _Results:
        """Takes a task off the list; returns where its result goes."""
        _, results = self._pending.pop(id(task))
        listeners = self._listeners[_about(task)]
        listeners.pop()
        if not listeners:
            del self._listeners[_about(task)]
        return results

    def _take_queued(self) -> list[ClientTask]:
        queued, self._queued = self._queued, []
        return queued

    def _tell(self, name: str, fields: Mapping[str, Any]) -> None:
        listeners = self._listeners.get((fields.get("kind"), fields.get("round"), fields.get("client")))
        (listeners[-1] if listeners else self._otherwise)(name, fields)


def _about(task: ClientTask) -> _About:
    return task.kind, task.round, task.client
