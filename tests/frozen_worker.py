"""A worker that keeps its weights and tells where they lie; client 0 writes to a frozen expert when it is told to."""

import json
from collections.abc import Callable

import torch

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.moe.residents import aliasing
from hfedmoe_ray.types import ClientMetrics, ClientTask, ExpertKey, TaskWeights
from hfedmoe_ray.wire import dump_metrics

KEY = ExpertKey(1, 0)


class FrozenWorker:
    """Its payload: address and size of a frozen expert's tensor, and the sum of its numbers."""

    def __init__(self, context: RunContext) -> None:
        self._run_dir = context.run_dir

    def execute(self, task: ClientTask, weights: TaskWeights, _: Callable[[], bool]) -> tuple[bytes, bytes, bytes]:
        self.kept = weights
        array = weights.experts[KEY]["up"]
        with aliasing():
            tensor = torch.from_numpy(array)
        if task.client == 0 and (self._run_dir / "write").exists():
            tensor.add_(1)
        found = {"address": array.ctypes.data, "bytes": array.nbytes, "sum": float(tensor.sum())}
        metrics = ClientMetrics(client=task.client, round=task.round, kind=task.kind, samples=1, tokens=1, loss=0.0)
        return json.dumps(found).encode(), dump_metrics(metrics), b""
