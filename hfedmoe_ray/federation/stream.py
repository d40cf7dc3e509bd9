"""An executor whose runs overlap: tasks can be given to it at any time, and their results taken in any order."""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from hfedmoe_ray.federation.executor import Executor, Further, Notify, nothing_further
from hfedmoe_ray.types import ClientTask, TaskResult, Weights


class Stream:
    """Feeds one run of the executor behind it with the tasks of many; to be used from one thread (see `Executor`)."""

    runs_elsewhere = False

    def __init__(self, executor: Executor, notify: Notify) -> None:
        """Wraps an executor, which the caller closes; `notify` is told what concerns no task in particular."""
        self._executor = executor
        self._notify = notify
        self._queued: list[ClientTask] = []
        """Not yet given to the executor."""
        self._pending: dict[int, tuple[ClientTask, Notify]] = {}
        """Tasks without a result, by identity, and who is told about each."""
        self._results: dict[int, TaskResult] = {}
        """Those that nobody has taken yet."""
        self._running: Generator[TaskResult, None, None] | None = None

    def publish(self, weights: Weights, keep: frozenset[int] = frozenset()) -> None:
        """See `Executor.publish`; versions that tasks without a result start from are kept too."""
        self._executor.publish(weights, keep | {task.version for task, _ in self._pending.values()})

    def submit(self, tasks: Sequence[ClientTask], notify: Notify) -> None:
        """Takes on tasks; they start, at the latest, when a result is waited for."""
        self._queued += tasks
        self._pending |= {id(task): (task, notify) for task in tasks}

    def result(self, task: ClientTask) -> TaskResult:
        """Returns the result of a task that was submitted, once, when it is there."""
        return self._next([task])

    def run(
        self, tasks: Sequence[ClientTask], notify: Notify, further: Further = nothing_further
    ) -> Generator[TaskResult, None, None]:
        """See `Executor.run`. Closing the iterator early leaves what still runs to be finished."""
        left = list(tasks)
        self.submit(left, notify)
        while left:
            result = self._next(left)
            left = [task for task in left if task is not result.task]
            yield result
            more = further()
            self.submit(more, notify)
            left += more

    def close(self) -> None:
        """Stops what still runs and forgets it; the executor can be used on."""
        if self._running is not None:
            self._running.close()
        self._running = None
        self._queued.clear()
        self._pending.clear()
        self._results.clear()

    def _next(self, tasks: Sequence[ClientTask]) -> TaskResult:
        """The first result of any of some tasks."""
        while True:
            for task in tasks:
                if id(task) in self._results:
                    return self._results.pop(id(task))
            if self._running is None:
                self._running = self._executor.run(self._take_queued(), self._tell, self._take_queued)
            result = next(self._running, None)
            if result is None:
                self._running = None  # it had no tasks left, and was over before these were queued
            else:
                del self._pending[id(result.task)]
                self._results[id(result.task)] = result

    def _take_queued(self) -> list[ClientTask]:
        queued, self._queued = self._queued, []
        return queued

    def _tell(self, name: str, fields: Mapping[str, Any]) -> None:
        about = (fields.get("kind"), fields.get("round"), fields.get("client"))
        named = (tell for task, tell in self._pending.values() if (task.kind, task.round, task.client) == about)
        tell: Callable[[str, Mapping[str, Any]], None] = next(named, self._notify)
        tell(name, fields)
