"""What a client's update weighs against what it trained, in every precision, and what int8 costs in accuracy.

hfedmoe bench bytes [--json FILE] [--seeds 0,1,2] [--rounds N] [--processes 2]

Runs the quickstart, federated and as it is configured, once for each precision and, for fp32 and int8, for each seed;
bytes are those of the payloads that arrived. The global model is evaluated on more of the test split than the
quickstart does, because on a thousand examples half a point is noise.
"""

import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import click
from output import Row, json_option, publish

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.records import RoundReport
from hfedmoe_ray.runtime import session
from hfedmoe_ray.types import ModelShape

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
FIXED = (
    "backend=local",
    "evaluate.every=1000",
    "evaluate.own=never",
    "data.test_examples=4000",
    "tracking.wandb.mode=disabled",
)
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "topk")
OVERHEAD, INT8_SHARE, INT8_COST = 1.02, 0.27, 0.5
"""The bars: payload over trained tensors, int8 over fp32, points of accuracy."""


@dataclass
class Traffic:
    """Training updates of one run, as they arrived."""

    accuracy: float = 0.0
    sent: int = 0
    """Bytes of all payloads."""
    trained: int = 0
    """Bytes of the tensors that trained and were to be sent, in fp32."""
    worst: float = 0.0
    """Largest ratio of the two for one client in one round."""
    shape: ModelShape | None = field(default=None, repr=False)

    def __call__(self, name: str, fields: Any) -> None:
        """Follows a run (see `federate.Render`)."""
        if name == "start":
            self.shape = ModelShape(**fields["facts"]["shape"])
        elif name == "round" and isinstance(fields, RoundReport) and fields.round > 0:
            self.add(fields)

    def add(self, report: RoundReport) -> None:
        """Counts the updates of one round."""
        assert self.shape is not None
        for record in report.clients:
            if record.status == "ok" and record.trained:
                ideal = self.shape.shared_bytes + record.trained * self.shape.expert_bytes
                self.sent += record.bytes_up
                self.trained += ideal
                self.worst = max(self.worst, record.bytes_up / ideal)

    @property
    def ratio(self) -> float:
        """Bytes sent over bytes trained."""
        return self.sent / self.trained


def run_one(precision: str, seed: int, overrides: Sequence[str]) -> Traffic:
    """Runs the quickstart once."""
    traffic = Traffic()
    keys = [*FIXED, *overrides, f"wire.upload={precision}", f"seed={seed}"]
    with tempfile.TemporaryDirectory() as directory:
        experiment = load_experiment(CONFIG, keys)
        summary = session.run(experiment, Path(directory), resume=False, render=traffic)
    traffic.accuracy = summary["accuracy"]
    return traffic


@click.command()
@json_option
@click.option("--seeds", default="0,1,2", show_default=True, help="Of fp32 and int8; the others run on the first.")
@click.option("--rounds", type=int, help="Fewer rounds than the quickstart's, for a quick look at the bytes.")
@click.option("--processes", default=2, show_default=True, help="Runs at a time, one thread each.")
def main(json_file: Path | None, seeds: str, rounds: int | None, processes: int) -> None:
    """Bytes of updates in every precision, on the quickstart."""
    numbers = [int(seed) for seed in seeds.split(",")]
    overrides = [] if rounds is None else [f"rounds={rounds}"]
    wanted = [(p, seed) for p in PRECISIONS for seed in (numbers if p in ("fp32", "int8") else numbers[:1])]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        pending = {(p, seed): pool.submit(run_one, p, seed, overrides) for p, seed in wanted}
        runs = {key: future.result() for key, future in pending.items()}

    first = {precision: runs[precision, numbers[0]] for precision in PRECISIONS}
    share = {precision: first[precision].ratio / first["fp32"].ratio for precision in PRECISIONS[1:]}
    cost = 100 * mean(runs["fp32", seed].accuracy - runs["int8", seed].accuracy for seed in numbers)
    figures = {
        "upload_over_ideal": first["fp32"].ratio,
        "upload_over_ideal_worst_client": first["fp32"].worst,
        **{f"{precision}_over_fp32": ratio for precision, ratio in share.items()},
        "int8_accuracy_cost": cost,
        "accuracy": {p: {str(seed): runs[p, seed].accuracy for q, seed in wanted if q == p} for p in PRECISIONS},
        "rounds": rounds or load_experiment(CONFIG).rounds,
    }
    rows = [
        _row("fp32 payload over bytes of trained tensors", first["fp32"].ratio, OVERHEAD),
        _row("the same, worst client of any round", first["fp32"].worst, OVERHEAD),
        *(
            _row(f"{precision} over fp32", ratio, INT8_SHARE if precision == "int8" else None)
            for precision, ratio in share.items()
        ),
        Row(
            what=f"accuracy cost of int8, mean of {len(numbers)} seeds",
            measured=f"{cost:+.2f} points",
            bar=f"≤ {INT8_COST}",
            ok=cost <= INT8_COST,
        ),
        *(Row(what=f"accuracy with {p}, seed {numbers[0]}", measured=f"{first[p].accuracy:.1%}") for p in PRECISIONS),
    ]
    publish(f"Bytes of updates: quickstart, {figures['rounds']} rounds", figures, rows, json_file)


def _row(what: str, ratio: float, bar: float | None) -> Row:
    if bar is None:
        return Row(what=what, measured=f"{ratio:.4f}")
    return Row(what=what, measured=f"{ratio:.4f}", bar=f"≤ {bar}", ok=ratio <= bar)


if __name__ == "__main__":
    main()
