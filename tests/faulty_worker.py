"""The real worker with a fault in some training tasks: it dies amid its steps, or sends what it did not train."""

import os
import pickle
import re
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.runtime.worker import client_worker
from hfedmoe_ray.types import Array, ClientMetrics, ClientTask, Role, TaskWeights
from hfedmoe_ray.wire import dump_metrics, expert_name, parse_metrics

Faults = Mapping[tuple[int, int], str | int]
"""By (round, client): a name in `LIES`, a reason to fail with, or after how many steps to die, once."""
Answer = tuple[bytes, ClientMetrics | bytes]


class FaultyWorker:
    """Give it its faults with `functools.partial`. A fault that happened is a file in the run directory."""

    def __init__(self, context: RunContext, frozen: Mapping[str, Any] | None = None, *, faults: Faults) -> None:
        self._run_dir = context.run_dir
        self._worker = client_worker(context, frozen)
        self._faults = faults

    def execute(
        self, task: ClientTask, weights: TaskWeights, should_stop: Callable[[], bool]
    ) -> tuple[bytes, bytes, bytes]:
        fault = self._faults.get((task.round, task.client)) if task.kind == "train" else None
        if isinstance(fault, int):
            should_stop = self._dying(task, fault, should_stop)
        payload, body, state = self._worker.execute(task, weights, should_stop)
        if isinstance(fault, str):
            if fault not in LIES:
                raise RuntimeError(fault)
            payload, metrics = LIES[fault](task, payload, parse_metrics(body))
            body = metrics if isinstance(metrics, bytes) else dump_metrics(metrics)
        return payload, body, state

    def _dying(self, task: ClientTask, after: int, should_stop: Callable[[], bool]) -> Callable[[], bool]:
        """Dies when asked for the time after so many steps; the worker asks before each."""
        died = self._run_dir / f"died-{task.round}-{task.client}"
        asked = 0

        def ask() -> bool:
            nonlocal asked
            if asked == after and not died.exists():
                died.write_text(str(asked))
                os.kill(os.getpid(), signal.SIGKILL)
            asked += 1
            return should_stop()

        return ask


def _every_number(change: Callable[[Array], Array]) -> Callable[[ClientTask, bytes, ClientMetrics], Answer]:
    """A lie about the first floating-point tensor of an expert."""

    def lie(_task: ClientTask, payload: bytes, metrics: ClientMetrics) -> Answer:
        tensors = load(payload)
        name = next(n for n, value in tensors.items() if n.startswith("expert.") and value.dtype == np.float32)
        return save(tensors | {name: np.ascontiguousarray(change(tensors[name]))}), metrics

    return lie


def _foreign(claimed: bool) -> Callable[[ClientTask, bytes, ClientMetrics], Answer]:
    """A trained expert under the name of one that was not assigned, in the metrics too or not."""

    def lie(task: ClientTask, payload: bytes, metrics: ClientMetrics) -> Answer:
        mine = next(iter(metrics.trained))
        other = expert_name(next(iter(task.plan.with_role(Role.ABSENT, Role.FROZEN))))
        tensors = {n.replace(f"expert.{mine}.", f"expert.{other}."): value for n, value in load(payload).items()}
        trained = {other if name == mine else name: steps for name, steps in metrics.trained.items()}
        return save(tensors), replace(metrics, trained=trained) if claimed else metrics

    return lie


def _without_training(_task: ClientTask, payload: bytes, metrics: ClientMetrics) -> Answer:
    """As if nothing had come of its steps: how the canary knows experts that silently never train."""
    return payload, replace(metrics, after=metrics.before)


_LOSS = re.compile(rb'"loss": [^,]+')
LIES: dict[str, Callable[[ClientTask, bytes, ClientMetrics], Answer]] = {
    "nan": _every_number(lambda value: value * np.float32("nan")),
    "infinite": _every_number(lambda value: value + np.float32("inf")),
    "huge": _every_number(lambda value: value * np.float32(1e12)),
    "shape": _every_number(lambda value: np.concatenate([value, value])),
    "type": _every_number(lambda value: value.astype(np.float64)),
    "foreign": _foreign(claimed=True),
    "unclaimed": _foreign(claimed=False),
    "truncated": lambda _task, payload, metrics: (payload[: len(payload) // 2], metrics),
    "pickled": lambda _task, payload, metrics: (pickle.dumps({"expert.0.0.w": payload}), metrics),
    "empty": lambda _task, _payload, metrics: (b"", metrics),
    "padded": lambda _task, payload, metrics: (payload + bytes(10**7), metrics),
    "untrained": _without_training,
    "examples": lambda _task, payload, metrics: (payload, replace(metrics, samples=10**12)),
    "nested": lambda _task, payload, _metrics: (payload, b"[" * 10**5),
    "endless": lambda _task, payload, metrics: (payload, _LOSS.sub(b'"loss": 1e999', dump_metrics(metrics))),
    "another": lambda _task, payload, metrics: (payload, replace(metrics, client=metrics.client + 1)),
}
