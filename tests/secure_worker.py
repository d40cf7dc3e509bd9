"""The real worker, which dies or fails at chosen steps of secure aggregation."""

import os
import signal
from collections.abc import Callable, Mapping
from typing import Any, Literal

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.runtime.worker import client_worker
from hfedmoe_ray.types import ClientTask, TaskWeights

Faults = Mapping[tuple[str, int], Literal["fail", "die", "die once"]]
"""By (kind of task, client). "die once": after the work is done, before the answer is given."""


class DroppingWorker:
    """Give it its faults with `functools.partial`."""

    def __init__(self, context: RunContext, frozen: Mapping[str, Any] | None = None, *, faults: Faults) -> None:
        self._run_dir = context.run_dir
        self._worker = client_worker(context, frozen)
        self._faults = faults

    def execute(
        self, task: ClientTask, weights: TaskWeights, should_stop: Callable[[], bool]
    ) -> tuple[bytes, bytes, bytes]:
        fault = self._faults.get((task.kind, task.client))
        if fault == "fail":
            raise RuntimeError(f"client {task.client} is gone")
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        answer = self._worker.execute(task, weights, should_stop)
        died = self._run_dir / f"died-{task.kind}-{task.client}"
        if fault == "die once" and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return answer
