"""A real worker, of whose gang a rank dies, fails, dawdles or hangs in mid-task where a file asks for it, once."""

import os
import signal
import threading
from collections.abc import Iterator

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.train.environment import quick_imports
from hfedmoe_ray.types import Array, ClientTask

with quick_imports():
    from hfedmoe_ray.train.local import ClientWorker

NEVER = threading.Event()
SLOW_S = 2.0


class MortalWorker(ClientWorker):
    """Looks after its first step for files `kill-<rank>`, `fail-<rank>`, `slow-<rank>` and `hang-<rank>`."""

    def __init__(self, context: RunContext) -> None:
        super().__init__(context)
        self._run_dir = context.run_dir

    def _batches(self, task: ClientTask, count: int) -> Iterator[Array]:
        for number, indices in enumerate(super()._batches(task, count)):
            if number == 1 and self._joined is not None:
                self._misbehave(self._joined.rank)
            yield indices

    def _misbehave(self, rank: int) -> None:
        if self._asked(f"kill-{rank}"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self._asked(f"fail-{rank}"):
            raise ValueError(f"rank {rank} cannot go on")
        if self._asked(f"slow-{rank}"):
            NEVER.wait(SLOW_S)
        if self._asked(f"hang-{rank}"):
            NEVER.wait(1000)

    def _asked(self, name: str) -> bool:
        path = self._run_dir / name
        found = path.exists()
        path.unlink(missing_ok=True)
        return found
