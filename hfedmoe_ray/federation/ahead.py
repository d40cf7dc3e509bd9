"""What is done while something else is: clients' tasks while the server works, and the server's work in threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from hfedmoe_ray.federation.executor import Executor, Notify
from hfedmoe_ray.types import ClientTask, TaskResult

AHEAD = 2
"""So many updates are read and checked beside the one that is folded: what is in memory at once is bounded by it."""
Item = TypeVar("Item")
Found = TypeVar("Found")


class Ahead:
    """Works on the next few of a row of items, in threads that are the same for all rows.

    (New ones for each row would each have a heap of its own, and leave it behind.)
    """

    def __init__(self) -> None:
        """Starts a thread when there is work for it; without this object they end."""
        self._threads = ThreadPoolExecutor(AHEAD)

    def in_order(self, work: Callable[[Item], Found], items: Iterable[Item]) -> Iterator[Found]:
        """Yields what `work` makes of each item, in order, the next `AHEAD` being worked on meanwhile."""
        coming = iter(items)
        begun = deque(self._threads.submit(work, item) for item in islice(coming, AHEAD))
        try:
            while begun:
                found = begun.popleft().result()
                begun.extend(self._threads.submit(work, item) for item in islice(coming, 1))
                yield found
        finally:
            for one in begun:
                one.cancel()
            wait(begun)


@contextmanager
def meanwhile(executor: Executor, tasks: Sequence[ClientTask], notify: Notify) -> Iterator[list[TaskResult]]:
    """Runs tasks while the block runs; the list that it yields holds their results, in client order, after the block.

    They start from weights that are published already, so the results are the same whenever they run: where the
    executor computes in this thread that is after the block. In a thread of their own they tell `notify` nothing until
    the block is over: what listens expects one caller.
    """
    results: list[TaskResult] = []
    if not tasks:
        yield results
    elif not executor.runs_elsewhere:
        yield results
        results += executor.run(tasks, notify)
    else:
        told: list[tuple[str, Mapping[str, Any]]] = []
        with ThreadPoolExecutor(max_workers=1) as thread:
            running = thread.submit(lambda: list(executor.run(tasks, lambda name, fields: told.append((name, fields)))))
            yield results
            results += running.result()
        for name, fields in told:
            notify(name, fields)
    results.sort(key=lambda result: result.task.client)
