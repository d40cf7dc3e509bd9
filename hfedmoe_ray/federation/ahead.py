"""Tasks that clients run while the server is busy with what came back before."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from hfedmoe_ray.federation.executor import Executor, Notify
from hfedmoe_ray.types import ClientTask, TaskResult


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
