"""An only rank's process group gives back what it is given, without a thread or a socket."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from hfedmoe_ray.train.alone import join_own_world


def joined() -> tuple[str, list[str], int]:
    """The group's backend, the threads that joining has started in this process, and the sockets it holds."""
    before = threads()
    join_own_world()
    value = torch.tensor([0.1, -0.0, float("inf")])
    kept = value.clone()
    for operation in (dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.MAX):
        dist.all_reduce(value, operation)
    dist.broadcast(value, src=0)
    dist.barrier()
    assert torch.equal(value.view(torch.int32), kept.view(torch.int32))
    with pytest.raises(RuntimeError):
        dist.all_to_all_single(torch.empty(3), value)
    started = [name for thread, name in threads().items() if thread not in before]
    return dist.get_backend(), started, len(psutil.Process().net_connections())


def threads() -> dict[int, str]:
    return {int(one.name): (one / "comm").read_text().strip() for one in Path("/proc/self/task").iterdir()}


def test_an_only_rank_talks_to_nobody():
    # In a process of its own: this one may be a rank of another world.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        backend, started, sockets = fresh.submit(joined).result()
    assert backend == "alone"
    assert not started
    assert not sockets
