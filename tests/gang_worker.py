"""A real worker, of whose gang a rank dies, fails or hangs in the middle of a task where a file asks for it, once."""

import os
import signal
import threading
from collections.abc import Iterator

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.train.local import ClientWorker
from hfedmoe_ray.types import Array, ClientTask

NEVER = threading.Event()


class MortalWorker(ClientWorker):
    """Looks after its first step for files `kill-<rank>`, `fail-<rank>` and `hang-<rank>` in the run directory."""

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
        if self._asked(f"hang-{rank}"):
            NEVER.wait(1000)

    def _asked(self, name: str) -> bool:
        path = self._run_dir / name
        found = path.exists()
        path.unlink(missing_ok=True)
        return found
