"""Whole runs in seconds: four clients of two tiers, tiny models, texts of three classes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_models import save_bert, save_mixtral

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.context import RunContext
from hfedmoe_ray.federation.checkpoint import load_checkpoint, run_identity
from hfedmoe_ray.federation.executor import Executor
from hfedmoe_ray.federation.rounds import run_experiment
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.records import RoundReport
from hfedmoe_ray.runtime.local import LocalExecutor
from hfedmoe_ray.types import Weights

HFEDMOE = {"name": "hfedmoe", "tau": 0.5}
PHONE = {"tflops": 1e-4, "memory_gbps": 1.0, "down_mbps": 10.0, "up_mbps": 5.0}
SERVER = {"tflops": 1e-2, "down_mbps": 1000.0, "up_mbps": 1000.0}
SLOWISH = {"tflops": 4e-3, "down_mbps": 400.0, "up_mbps": 400.0}
"""Takes about two and a half times as long as SERVER."""


class Elsewhere(LocalExecutor):
    """Runs tasks in whatever thread asks, as an executor with processes of its own lets callers do."""

    runs_elsewhere = True


class Recorder:
    """Keeps what a run reports."""

    def __init__(self) -> None:
        self.rounds: list[RoundReport] = []
        self.facts: dict[str, Any] = {}
        self.events: list[tuple[str, dict[str, Any]]] = []

    def start(self, _config: Any, facts: Any) -> None:
        self.facts = dict(facts)

    def event(self, name: str, fields: Any) -> None:
        self.events.append((name, dict(fields)))

    def round(self, report: RoundReport) -> None:
        self.rounds.append(report)

    def finish(self, _summary: Any) -> None:
        pass


def write_sources(root: Path) -> None:
    """Writes a BERT, a Mixtral, and texts of three classes, each with words of its own."""
    save_bert(root / "bert")
    save_mixtral(root / "mixtral")
    texts = [(i % 3, " ".join(f"word{3 * ((i + j * j) % 5) + i % 3}" for j in range(3 + i % 7))) for i in range(160)]
    rows = [{"text": text, "label": f"class {label}"} for label, text in texts]
    (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def experiment(sources: Path, family: str = "bert", **changes: Any) -> Experiment:
    """Two rounds on the sources (fixture `sources`), with other top-level sections where `changes` has them."""
    upcycle = {"how": "copy", "experts": 6, "top_k": 2, "layers": [2, 3], "noise": 0.3} if family == "bert" else None
    config: dict[str, Any] = {
        "name": "tiny",
        "backend": "local",
        "rounds": 2,
        "strategy": HFEDMOE,
        "clients": {
            "count": 4,
            "tiers": [
                {"name": "phone", "share": 0.5, "experts": 0.25, "device": 0.1},
                {"name": "server", "share": 0.5, "experts": 0.5, "device": 0.1},
            ],
        },
        "model": {"source": str(sources / family), "upcycle": upcycle, "trainable": "experts"},
        "data": {"source": str(sources / "texts.jsonl"), "max_length": 12, "partition": {"how": "iid"}},
        "local": {"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "profile_examples": 8},
    }
    return Experiment.model_validate(config | changes)


def on_devices(sources: Path, phone: dict[str, float] = PHONE, family: str = "bert", **changes: Any) -> Experiment:
    """The tiny run, whose tiers stand for devices."""
    tiers = [
        {"name": "phone", "share": 0.5, "experts": 0.25, "device": 0.1, "simulated": phone},
        {"name": "server", "share": 0.5, "experts": 0.5, "device": 0.1, "simulated": SERVER},
    ]
    return experiment(sources, family, clients={"count": 4, "tiers": tiers}, **changes)


def run(
    made: Experiment,
    run_dir: Path,
    *,
    resume: bool = False,
    stop_after: int | None = None,
    where: Callable[[RunContext], Executor] = LocalExecutor,
    recorder: Recorder | None = None,
) -> tuple[RunContext, dict[str, Any], Recorder]:
    """Runs an experiment, here or elsewhere, to its end or until after a round; returns its summary and its record."""
    context = prepare_run(made, run_dir)
    executor, recorder = where(context), recorder or Recorder()

    def should_stop() -> bool:
        return stop_after is not None and bool(recorder.rounds) and recorder.rounds[-1].round >= stop_after

    try:
        summary = run_experiment(context, executor, recorder, resume=resume, should_stop=should_stop)
    finally:
        executor.close()
    return context, summary, recorder


def final_weights(context: RunContext) -> Weights:
    """The weights of a run's last checkpoint."""
    return load_checkpoint(context.run_dir / "checkpoints", run_identity(context)).weights
