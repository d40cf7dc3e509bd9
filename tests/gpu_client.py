"""A client that takes itself to be on a shared GPU, on a machine without one: for the pool's part in sharing."""

import json
from typing import Any

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.runtime import client
from hfedmoe_ray.types import ClientMetrics, ClientTask, TaskWeights
from hfedmoe_ray.wire import dump_metrics


class GpuClient(client.ClientActor):
    """Believes to have half of GPU 0."""

    def __init__(self, context: RunContext, worker_factory: Any, _: float) -> None:
        client._visible_gpu = lambda: "0"
        super().__init__(context, worker_factory, 0.5)


class FrozenReader:
    """Its payload: where the frozen tensors it was given lie."""

    def __init__(self, _: RunContext, frozen: Any = None) -> None:
        self._frozen = frozen

    def execute(self, task: ClientTask, _: TaskWeights, __: Any) -> tuple[bytes, bytes, bytes]:
        found = {name: tensor.data_ptr() for name, tensor in self._frozen.items()}
        metrics = ClientMetrics(client=task.client, round=task.round, kind=task.kind, samples=1, tokens=1, loss=0.0)
        return json.dumps(found).encode(), dump_metrics(metrics), b""
