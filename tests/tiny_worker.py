"""A worker for tests of the runtime itself: a little NumPy on the published weights, and misbehaviour on request.

A file named `<behaviour>-<client>` in the run directory makes that client misbehave: `kill` (once: the file is removed
first), `fail`, `slow` (until asked to stop) or `hang` (deaf to it).
"""

import hashlib
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.context import PreparedData, PreparedModel, RunContext
from hfedmoe_ray.train.environment import ENVIRONMENT
from hfedmoe_ray.types import (
    ClientMetrics,
    ClientTask,
    ExpertKey,
    ExpertPlan,
    ModelShape,
    PersonalWeights,
    Role,
    TaskResult,
    TaskWeights,
    Weights,
)
from hfedmoe_ray.wire import dump_metrics

LAYERS, EXPERTS = 2, 4
SHAPE = ModelShape(
    layers=LAYERS, experts=EXPERTS, top_k=2, hidden=8, expert_bytes=64, shared_bytes=64, frozen_bytes=1024
)
TIERS = [
    {"name": "phone", "share": 0.5, "experts": 0.25, "device": 0.1, "memory_gib": 0.1},
    {"name": "server", "share": 0.5, "experts": 0.5, "device": 0.2, "memory_gib": 0.2},
]
NEVER = threading.Event()
STATE_REPEATS = 5_000


class TinyWorker:
    """Its payload is a digest of everything it was given, so that any difference in inputs shows in the result.

    The same digest, repeated to a size that no longer travels inside a message, is the client's new state.
    """

    def __init__(self, context: RunContext) -> None:
        self._run_dir = context.run_dir
        self._base = (context.model.path / "base.bin").read_bytes() + (context.data.path / "rows.bin").read_bytes()

    def execute(
        self, task: ClientTask, weights: TaskWeights, should_stop: Callable[[], bool]
    ) -> tuple[bytes, bytes, bytes]:
        self._misbehave(task.client, should_stop)
        digest = hashlib.sha256(self._base + f"{task.seed} {task.round} {task.client}".encode())
        digest.update(weights.state)
        for name in sorted(weights.shared):
            digest.update(name.encode() + weights.shared[name].tobytes())
        for key in sorted(weights.experts):
            for name in sorted(weights.experts[key]):
                digest.update(f"{key} {name}".encode() + weights.experts[key][name].tobytes())
        arrays = [*weights.shared.values(), *(a for named in weights.experts.values() for a in named.values())]
        metrics = ClientMetrics(
            client=task.client,
            round=task.round,
            kind=task.kind,
            samples=len(weights.experts),
            tokens=sum(array.flags.writeable for array in arrays),
            loss=float(ENVIRONMENT.items() <= os.environ.items()),
        )
        return digest.digest() + bytes(200_000), dump_metrics(metrics), digest.digest() * STATE_REPEATS

    def _misbehave(self, client: int, should_stop: Callable[[], bool]) -> None:
        kill = self._run_dir / f"kill-{client}"
        if kill.exists():
            kill.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        if (self._run_dir / f"fail-{client}").exists():
            raise ValueError(f"client {client} has no examples")
        while (self._run_dir / f"slow-{client}").exists():
            if should_stop():
                raise InterruptedError("stopped")
            NEVER.wait(0.01)
        if (self._run_dir / f"hang-{client}").exists():
            NEVER.wait(1000)


class Forged:
    """An object of a class, where bytes are due."""


class ForgingWorker(TinyWorker):
    """Has client 1's actor return one: in round 0 for the payload, in round 1 for the reason."""

    def __init__(self, context: RunContext) -> None:
        from hfedmoe_ray.runtime import client

        super().__init__(context)
        self._task: ClientTask | None = None
        honest = client.answered

        def forged(done: tuple[bytes, bytes, bytes]) -> Any:
            payload, (state, (status, body, reason)) = honest(done)
            assert self._task is not None
            if self._task.client != 1:
                return payload, (state, (status, body, reason))
            if self._task.round == 0:
                return Forged(), (state, (status, body, reason))
            return payload, (state, (status, body, Forged()))

        client.answered = forged

    def execute(
        self, task: ClientTask, weights: TaskWeights, should_stop: Callable[[], bool]
    ) -> tuple[bytes, bytes, bytes]:
        self._task = task
        return super().execute(task, weights, should_stop)


class BrokenWorker:
    """Cannot load its model."""

    def __init__(self, context: RunContext) -> None:
        raise ValueError(f"{context.model.path} is not a model")


def experiment(**keys: object) -> Experiment:
    """Six clients of two tiers, with the given top-level keys on top."""
    base = {
        "name": "tiny",
        "clients": {"count": 6, "tiers": TIERS},
        "model": {"source": "package:none"},
        "data": {"source": "none.jsonl"},
    }
    return Experiment.model_validate(base | keys)


def context(directory: Path, **keys: object) -> RunContext:
    """A run whose model and data are a few bytes below `directory`."""
    for name, file in (("model", "base.bin"), ("data", "rows.bin"), ("run", "")):
        (directory / name).mkdir(parents=True, exist_ok=True)
        if file:
            (directory / name / file).write_bytes(name.encode() * 1000)
    return RunContext(
        experiment=experiment(**keys),
        run_dir=directory / "run",
        model=PreparedModel(path=directory / "model", sha256="m", shape=SHAPE),
        data=PreparedData(path=directory / "data", sha256="d", label_names=("a", "b"), counts=((5, 5),) * 6),
    )


def weights(version: int = 0, personal: dict[int, PersonalWeights] | None = None) -> Weights:
    """Weights that differ between versions in the shared part and in expert (0, 0) alone."""
    rng = np.random.default_rng(0)
    experts = {key: {"up": rng.normal(size=(8, 4)), "down": rng.normal(size=(4, 8))} for key in list(SHAPE.keys())}
    experts[ExpertKey(0, 0)]["up"] += version
    shared = {"router": rng.normal(size=(4, 8)) + version}
    return Weights(version=version, shared=shared, experts=experts, personal=personal)


def task(client: int, version: int = 0, present: int = 3, **fields: object) -> ClientTask:
    """A training task of a client that holds the first `present` experts of each layer."""
    row = tuple(Role.TRAIN if e < present else Role.ABSENT for e in range(EXPERTS))
    values = {"kind": "train", "round": 1, "client": client, "seed": 0, "version": version, "weight": float(present)}
    return ClientTask(plan=ExpertPlan(roles=(row,) * LAYERS), **(values | fields))


class Log:
    """Collects what an executor notifies."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []

    def __call__(self, name: str, fields: dict[str, object]) -> None:
        self.events.append((name, dict(fields)))

    def named(self, name: str) -> list[dict[str, object]]:
        return [fields for event, fields in self.events if event == name]


def outcome(results: list[TaskResult]) -> dict[int, tuple[str, bytes]]:
    """(status, payload) by client."""
    return {r.task.client: (r.status, r.payload() if r.payload else b"") for r in results}
