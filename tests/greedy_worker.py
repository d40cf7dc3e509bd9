"""A `tiny_worker.TinyWorker` one of whose clients takes all the memory it is given."""

import ctypes
from collections.abc import Callable

import numpy as np
from tiny_worker import TinyWorker

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.types import ClientTask, TaskWeights

PIECE = 2**18
"""Bytes taken at a time: small enough to lie in the heap, which keeps what is freed until it is trimmed."""
GREEDY = 3


class GreedyWorker(TinyWorker):
    """With a file `native` in the run directory it is native code that gets no more, and ends the process."""

    def __init__(self, context: RunContext) -> None:
        super().__init__(context)
        self._native = (context.run_dir / "native").exists()

    def execute(
        self, task: ClientTask, weights: TaskWeights, should_stop: Callable[[], bool]
    ) -> tuple[bytes, bytes, bytes]:
        if task.client == GREEDY:
            taken = [np.ones(PIECE, np.uint8)]
            while not self._native:
                taken.append(np.ones(PIECE, np.uint8))
            libc = ctypes.CDLL(None)
            libc.malloc.restype = ctypes.c_void_p
            libc.malloc.argtypes = [ctypes.c_size_t]
            while (piece := libc.malloc(PIECE)) is not None:
                ctypes.memset(piece, 1, PIECE)
            libc.abort()
        return super().execute(task, weights, should_stop)
