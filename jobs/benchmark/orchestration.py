"""What a round costs beside the clients' work: clients that do nothing, clients that only send, and how many at once.

hfedmoe bench orchestration [--json FILE] [--repeats 5]

The executor, actors, wire and object store are those of every run on Ray; only the work is left out. A round is what
the server does between two plans: publish the weights, hand out the tasks, take every answer and read its payload.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from output import Row, json_option, publish

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.context import PreparedData, PreparedModel, RunContext
from hfedmoe_ray.runtime.cluster import connected
from hfedmoe_ray.runtime.pool import RayExecutor
from hfedmoe_ray.runtime.slot import State
from hfedmoe_ray.strategies.scores import uniform_plan
from hfedmoe_ray.types import ClientMetrics, ClientTask, ModelShape, Role, TaskWeights, Weights
from hfedmoe_ray.wire import dump_metrics

FEW, MANY, AT_ONCE = 8, 300, 64
PAYLOAD = 64 << 20
"""Bytes of a large update."""
NAP_S = 5.0
"""How long clients that are counted sleep: longer than it takes to give all of them a task."""
BARS = {"noop_round_s_8": 0.05, "noop_round_s_300": 0.4, "payload_round_s_8x64mb": 0.5}
_SHAPE = ModelShape(layers=1, experts=2, top_k=1, hidden=8, expert_bytes=64, shared_bytes=64, frozen_bytes=0)


class Idle:
    """A client that does nothing."""

    def __init__(self, context: RunContext) -> None:
        """Needs nothing."""
        del context

    def execute(
        self, task: ClientTask, weights: TaskWeights, should_stop: Callable[[], bool]
    ) -> tuple[bytes, bytes, bytes]:
        """Answers."""
        del weights, should_stop
        started = time.time()
        payload = self.work()
        metrics = ClientMetrics(
            client=task.client,
            round=task.round,
            kind=task.kind,
            samples=1,
            tokens=1,
            loss=started,  # the only free numbers in an answer: when the client began, and how long it took
            seconds=time.time() - started,
        )
        return payload, dump_metrics(metrics), b""

    def work(self) -> bytes:
        """Returns what is sent."""
        return b"nothing"


class Sender(Idle):
    """A client that has an update ready."""

    def __init__(self, context: RunContext) -> None:
        """Makes the update."""
        super().__init__(context)
        self._payload = bytes(PAYLOAD)

    def work(self) -> bytes:
        """Returns the update."""
        return self._payload


class Sleeper(Idle):
    """A client that takes its time."""

    def work(self) -> bytes:
        """Sleeps."""
        time.sleep(NAP_S)
        return super().work()


@click.command()
@json_option
@click.option("--repeats", default=5, show_default=True, help="Rounds of each kind, of which the median is told.")
def main(json_file: Path | None, repeats: int) -> None:
    """Seconds of a round without work, and clients at work at once."""
    seconds: dict[str, float] = {}
    with connected(None):
        with _executor(Idle, FEW) as executor:
            seconds["noop_round_s_8"] = _round_seconds(executor, FEW, repeats)
        with _executor(Idle, MANY, slots=FEW) as executor:
            seconds["noop_round_s_300"] = _round_seconds(executor, MANY, repeats)
        with _executor(Sender, FEW) as executor:
            seconds["payload_round_s_8x64mb"] = _round_seconds(executor, FEW, repeats)
        at_once = most_at_once()
    rows = [
        Row(what=what, measured=f"{seconds[key]:.3f} s", bar=f"≤ {BARS[key]:g}", ok=seconds[key] <= BARS[key])
        for key, what in (
            ("noop_round_s_8", f"a round of {FEW} clients that do nothing"),
            ("noop_round_s_300", f"a round of {MANY} clients that do nothing, in {FEW} slots"),
            ("payload_round_s_8x64mb", f"a round of {FEW} clients that send 64 MiB each"),
        )
    ]
    rows.append(Row(what="clients at work at once", measured=str(at_once), bar=f"≥ {AT_ONCE}", ok=at_once >= AT_ONCE))
    publish("Orchestration", {**seconds, "concurrent_clients_2core_driver": at_once}, rows, json_file)


@contextmanager
def _executor(worker: type[Idle], clients: int, slots: int | None = None) -> Iterator[RayExecutor]:
    """An executor whose actors have all started."""
    tier = {"name": "any", "share": 1.0, "experts": 1.0, "device": 0.01, "memory_gib": 0.01}
    values: Mapping[str, Any] = {
        "name": f"{worker.__name__.lower()}-{clients}",
        "clients": {"count": clients, "tiers": [tier]},
        "model": {"source": "package:none"},
        "data": {"source": "none.jsonl"},
        "actors": "pooled",
        "runtime": {"slots": slots or clients, "memory_cap": False},
    }
    with tempfile.TemporaryDirectory() as directory:
        nowhere = Path(directory)
        context = RunContext(
            experiment=Experiment.model_validate(values),
            run_dir=nowhere,
            model=PreparedModel(path=nowhere, sha256="", shape=_SHAPE),
            data=PreparedData(path=nowhere, sha256="", label_names=("none",), counts=((1,),) * clients),
        )
        executor = RayExecutor(context, worker_factory=worker)
        try:
            executor.publish(_weights(0))
            # Rounds are served by the actors that are ready; what is measured should find all of them so.
            while any(slot.state is not State.IDLE for slot in executor.slots):
                _take(executor, clients, version=0)
            _take(executor, clients, version=0)
            yield executor
        finally:
            executor.close()


def _weights(version: int) -> Weights:
    return Weights(version=version, shared={"router": np.full((2, 8), version, np.float32)}, experts={})


def _take(executor: RayExecutor, clients: int, version: int) -> list[ClientMetrics]:
    """One round: every client's metrics, its payload read."""
    plan = uniform_plan((_SHAPE.layers, _SHAPE.experts), Role.ABSENT)
    tasks = [
        ClientTask(kind="train", round=1, client=client, seed=0, plan=plan, version=version)
        for client in range(clients)
    ]
    answers = []
    for result in executor.run(tasks, lambda _name, _fields: None):
        assert result.status == "ok", result.reason
        assert result.metrics is not None
        assert result.payload is not None
        assert len(result.payload()) > 0
        answers.append(result.metrics)
    assert len(answers) == clients
    return answers


def _round_seconds(executor: RayExecutor, clients: int, repeats: int) -> float:
    taken = []
    for version in range(1, repeats + 1):
        started = time.perf_counter()
        executor.publish(_weights(version))
        _take(executor, clients, version)
        taken.append(time.perf_counter() - started)
    return median(taken)


def most_at_once() -> int:
    """The most clients that were at work at the same instant, of `AT_ONCE`. Ray must be connected."""
    with _executor(Sleeper, AT_ONCE) as executor:
        spans = [(one.loss, one.loss + one.seconds) for one in _take(executor, AT_ONCE, version=0)]
    return max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)


if __name__ == "__main__":
    main()
