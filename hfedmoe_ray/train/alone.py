"""A process group of one rank, for DeepSpeed, which does not start without one.

Gloo would do: it starts four threads in every client's process, two of which wake up a hundred times a second, and it
hands each parameter of each engine to them. Between an only rank and itself there is nothing to send: what
a collective is given is its result already. So nothing runs here, no socket is bound and no port is agreed on.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, _create_work_from_future  # type: ignore[attr-defined]
from torch.futures import Future

_BACKEND = "alone"


class AloneProcessGroup(dist.ProcessGroup):
    """The collectives that DeepSpeed asks an only rank for; a further one is refused by the class it extends."""

    def getBackendName(self) -> str:  # noqa: N802 (torch's name)
        """The name it is registered under."""
        return _BACKEND

    def allreduce(self, tensors: list[Tensor], *_options: Any) -> dist.Work:  # type: ignore[override]
        """Sum, mean, minimum and maximum of one are that one."""
        return _done(tensors)

    def broadcast(self, tensors: list[Tensor], *_options: Any) -> dist.Work:  # type: ignore[override]
        """The source is this rank."""
        return _done(tensors)

    def barrier(self, *_options: Any, **_named: Any) -> dist.Work:
        """Everyone is here."""
        return _done([])


def join_own_world() -> None:
    """Makes this process the only rank of a process group, once."""
    if dist.is_initialized():
        return
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in world.items():
        os.environ.setdefault(name, value)
    if _BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(_BACKEND, _alone, devices=["cpu", "cuda"])
    dist.init_process_group(_BACKEND, store=HashStore(), rank=0, world_size=1)


def _alone(_store: Any, rank: int, size: int, _timeout: Any) -> AloneProcessGroup:
    return AloneProcessGroup(rank, size)  # type: ignore[call-arg]


def _done(tensors: list[Tensor]) -> dist.Work:
    future: Future[list[Tensor]] = torch.futures.Future()
    future.set_result(tensors)
    work: dist.Work = _create_work_from_future(future)
    return work
