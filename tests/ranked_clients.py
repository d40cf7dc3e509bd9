"""A client of two ranks without Ray: two processes that meet in a store, each with a worker of its own."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.train.environment import inherited, quick_imports
from hfedmoe_ray.types import ClientMetrics, ClientTask, TaskWeights
from hfedmoe_ray.wire import checksum, expert_name, parse_metrics

TIMEOUT = 60.0
_joined: list[Any] = []
_store: list[Any] = []


class Pair:
    """Two processes that have joined."""

    def __init__(self, first: ProcessPoolExecutor, second: ProcessPoolExecutor) -> None:
        self.first, self.second = first, second

    def work(self, *task: Any) -> tuple[bytes, ClientMetrics, list[dict[str, str]]]:
        """What the first rank answers (payload, metrics), and what each rank's experts came out as."""
        (payload, metrics, ours), (_, _, theirs) = (end.result(timeout=TIMEOUT) for end in self.start(*task))
        return payload, parse_metrics(metrics), [ours, theirs]

    def start(self, *task: Any, dying: int | None = None) -> list[Future[Any]]:
        """Gives both ranks a task; one of them may die after its last step."""
        processes = (self.first, self.second)
        return [one.submit(client_of_two, rank, *task, die=rank == dying) for rank, one in enumerate(processes)]

    def first_alone(self, *task: Any) -> bytes:
        """What the first rank answers to a task that is its own."""
        payload, _, _ = self.first.submit(client_of_two, 0, *task).result(timeout=TIMEOUT)
        return payload


@contextmanager
def pair(patience: float = TIMEOUT, *, gpus: bool = False) -> Iterator[Pair]:
    """Two joined processes with a client's environment.

    Args:
        patience: Seconds that a rank waits for the other.
        gpus: Whether each has a GPU of its own.
    """
    # Without a GPU, which a fork cannot share, all of them are forks of one process that has imported what they need.
    ways = multiprocessing.get_context("spawn" if gpus else "forkserver")
    ways.set_forkserver_preload(["hfedmoe_ray.train.local"])
    with inherited(), ProcessPoolExecutor(1, ways) as first, ProcessPoolExecutor(1, ways) as second:
        if gpus:
            for rank, one in enumerate((first, second)):
                one.submit(os.environ.update, {"CUDA_VISIBLE_DEVICES": str(rank)}).result(timeout=TIMEOUT)
        port = first.submit(_open).result(timeout=TIMEOUT)
        joining = [first.submit(_join, 0, port, patience), second.submit(_join, 1, port, patience)]
        for one in joining:
            one.result(timeout=TIMEOUT)
        yield Pair(first, second)


def alone(context: RunContext, task: ClientTask, weights: TaskWeights) -> tuple[bytes, ClientMetrics]:
    """What a single process answers."""
    from hfedmoe_ray.train.local import ClientWorker

    payload, metrics, _ = ClientWorker(context).execute(task, weights, lambda: False)
    return payload, parse_metrics(metrics)


def listening() -> list[str]:
    """Addresses at which this process listens."""
    import psutil

    return [c.laddr.ip for c in psutil.Process().net_connections(kind="inet") if c.status == "LISTEN"]


def _open() -> int:
    from hfedmoe_ray.train.ranks import open_store

    store, port = open_store(TIMEOUT)
    _store.append(store)
    return port


def _join(rank: int, port: int, patience: float) -> None:
    from hfedmoe_ray.train.ranks import JoinedRanks, reach_store

    _joined.append(JoinedRanks(_store[0] if rank == 0 else reach_store(port, TIMEOUT), rank, 2, patience))


def client_of_two(
    rank: int, context: RunContext, task: ClientTask, weights: TaskWeights, *, die: bool = False
) -> tuple[bytes, bytes, dict[str, str]]:
    """Takes one rank's part in a task; returns what the first answers, and the checksums of its experts at the end."""
    with quick_imports():
        from hfedmoe_ray.train.local import ClientWorker
        from hfedmoe_ray.train.steps import LocalSteps

    worker = ClientWorker(context)
    worker.join(_joined[0])
    found: dict[str, str] = {}
    finish = LocalSteps.finish

    def watched(steps: LocalSteps) -> None:
        if die:
            os._exit(1)
        finish(steps)
        found.update({expert_name(key): checksum(worker._model.read_expert(key)) for key in task.plan.trainable})

    LocalSteps.finish = watched
    try:
        if rank:
            worker.follow(task, weights)
            return b"", b"", found
        payload, metrics, _ = worker.execute(task, weights, lambda: False)
        return payload, metrics, found
    finally:
        LocalSteps.finish = finish
