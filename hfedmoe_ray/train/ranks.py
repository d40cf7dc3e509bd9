"""The ranks of one client: processes that share each of its batches and take the same optimizer steps.

A client of several whole devices runs as one rank on each. Every rank holds the same sub-model and draws the same
batches; of each it takes its own slice. What depends on the whole batch (the routing that eq. 15 chooses by, gradients,
losses) is added up over the ranks, in the order of their numbers, so that a step is that of one rank within the
rounding of sums, and two runs of the same ranks are the same to the bit.

The first rank answers for the client. The ranks are on one machine and meet in a store on its loopback interface, at a
port that the kernel picks.

Legend: k ranks.
"""

import os
import socket
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from hfedmoe_ray.types import Array, FloatArray

_BUCKET = 2**24
"""Numbers that are added up in one go: 64 MiB of fp32."""
_HOST = "127.0.0.1"
_FAILURE = "failure"
"""Key in the store."""


class Ranks:
    """The ranks of a client that runs as one process: there is nobody to share with."""

    rank = 0
    size = 1
    group: Any = None
    """The process group an engine reduces over; None: a world of this process alone, which the engine makes."""
    own: Any = None
    """The group of this process alone, where it is one of several."""

    def share(self, indices: Array) -> Array:
        """Returns this rank's slice of a batch; empty where there are more ranks than examples."""
        share: Array = np.array_split(indices, self.size)[self.rank]
        return share

    def largest_share(self, count: int) -> int:
        """Returns how many of so many examples the first rank gets; no other gets more."""
        return -(-count // self.size)

    def gather(self, values: FloatArray) -> FloatArray:
        """Returns what every rank has given, [k, ...], of the same shape on each."""
        return values[None]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank; the same answer on all."""
        return bool(self.gather(np.array([float(flag)])).any())

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Makes each tensor its sum over the ranks, in place."""


class _OwnRank(Ranks):
    """One rank of several at work for a client that has one."""

    def __init__(self, own: Any) -> None:
        self.group = self.own = own


class JoinedRanks(Ranks):
    """One of several ranks."""

    def __init__(self, store: Store, rank: int, size: int, timeout: float) -> None:
        """Joins the others, for the life of this process; returns when all are there.

        Args:
            store: The first rank's (`open_store`), or a connection to it (`reach_store`).
            rank: Number of this one.
            size: k.
            timeout: Seconds that a rank waits for another, here and wherever they exchange anything.

        Raises:
            RuntimeError: Another rank has died, or did not come in time.
        """
        self.rank, self.size = rank, size
        world = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": size, "MASTER_ADDR": _HOST, "MASTER_PORT": 0}
        os.environ.update({name: str(value) for name, value in world.items()})
        on_gpu = torch.cuda.is_available()
        limit = timedelta(seconds=timeout)
        dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size, timeout=limit)
        self.group = dist.group.WORLD
        # Statistics are exchanged between hosts' memories, wherever gradients are.
        self._host_group = dist.new_group(backend="gloo", timeout=limit) if on_gpu else self.group
        self.own = [dist.new_group([number], timeout=limit) for number in range(size)][rank]
        self.alone: Ranks = _OwnRank(self.own)
        """This rank by itself, for clients that run as one."""
        # The first rank's serves the others as long as it lives.
        self._store = store

    def gather(self, values: FloatArray) -> FloatArray:
        """See `Ranks.gather`."""
        own = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64))
        gathered = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(gathered, own, group=self._host_group)
        return torch.stack(gathered).numpy()

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """See `Ranks.add_up`."""
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat, group=self.group)
            for tensor, summed in zip(bucket, torch.split(flat, [one.numel() for one in bucket]), strict=True):
                tensor.copy_(summed.view_as(tensor))

    def fail(self, why: str) -> None:
        """Leaves word of why this rank will take part no more, for the others to find when they miss it."""
        self._store.set(_FAILURE, why)

    def failure(self) -> str:
        """What a rank that failed has left; empty where none has."""
        return self._store.get(_FAILURE).decode() if self._store.check([_FAILURE]) else ""


def open_store(timeout: float) -> tuple[TCPStore, int]:
    """Returns the store in which the ranks meet, and its port. It listens on the loopback interface alone."""
    listening = socket.socket()
    listening.bind((_HOST, 0))
    listening.listen()
    port = listening.getsockname()[1]
    limit = timedelta(seconds=timeout)
    store = TCPStore(_HOST, port, None, True, limit, wait_for_workers=False, master_listen_fd=listening.detach())
    return store, port


def reach_store(port: int, timeout: float) -> TCPStore:
    """Connects to the first rank's store."""
    return TCPStore(_HOST, port, None, False, timedelta(seconds=timeout), wait_for_workers=False)


def caused_by_another_rank(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone or silent. Torch has no class for gloo's."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(word in str(error) for word in ("gloo", "NCCL", "c10d"))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors in turn, so many together as make a bucket."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(one.numel() for one in bucket) + tensor.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
