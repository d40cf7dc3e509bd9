"""What a finished run contributes to a comparison: its figures, read from the files it left."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from hfedmoe_ray.comparison.statistics import Better
from hfedmoe_ray.records import RoundReport
from hfedmoe_ray.tracking.record import RunRecord, read_run

Unit = Literal["share", "share²", "number", "bytes"]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A figure that strategies are compared by."""

    key: str
    title: str
    unit: Unit
    better: Better | None
    """Which end is the good one; None where neither is."""
    meaning: str


ACCURACY = (
    Metric(
        key="accuracy",
        title="Global",
        unit="share",
        better="high",
        meaning="of the global model with all experts on the test set, after the last round",
    ),
    Metric(
        key="best_accuracy",
        title="Best",
        unit="share",
        better="high",
        meaning="the same, in the best round that was evaluated",
    ),
    Metric(
        key="own_accuracy",
        title="Own",
        unit="share",
        better="high",
        meaning="mean over clients on their own test data, each holding what its budget allows",
    ),
    Metric(
        key="personalised_accuracy",
        title="Own, trained",
        unit="share",
        better="high",
        meaning="the same after one more local round each",
    ),
)
FAIRNESS = (
    Metric(
        key="own_worst_tenth",
        title="Worst tenth",
        unit="share",
        better="high",
        meaning="the worst tenth of the clients on their own test data",
    ),
    Metric(
        key="personalised_worst_tenth",
        title="Worst tenth, trained",
        unit="share",
        better="high",
        meaning="the same after one more local round each",
    ),
    Metric(
        key="own_variance",
        title="Variance",
        unit="share²",
        better="low",
        meaning="of own accuracy over clients, in squared percentage points",
    ),
    Metric(
        key="personalised_variance",
        title="Variance, trained",
        unit="share²",
        better="low",
        meaning="the same after one more local round each",
    ),
)
EFFORT = (
    Metric(
        key="rounds_to_target",
        title="Rounds to target",
        unit="number",
        better="low",
        meaning="first round evaluated in which the global model reached the target accuracy",
    ),
    Metric(
        key="rounds_to_own_target",
        title="Rounds to target, own",
        unit="number",
        better="low",
        meaning="the same for the mean of clients on their own test data, where `evaluate.own: always` measures it",
    ),
    Metric(key="bytes_up", title="Up (MiB)", unit="bytes", better="low", meaning="sent by all clients, whole run"),
    Metric(key="bytes_down", title="Down (MiB)", unit="bytes", better="low", meaning="sent to all clients"),
    Metric(
        key="load_cv",
        title="Load CV",
        unit="number",
        better="low",
        meaning="coefficient of variation, over experts, of how many client rounds trained each",
    ),
    Metric(
        key="experts_a_round",
        title="Experts a round",
        unit="number",
        better=None,
        meaning="experts that at least one client trained in a round, mean over rounds",
    ),
)
GROUPS = (("Accuracy", ACCURACY), ("Fairness over clients", FAIRNESS), ("Cost and balance", EFFORT))
"""What stands in one table."""
METRICS = (*ACCURACY, *FAIRNESS, *EFFORT)
MEASURED = (
    Metric(
        key="peak_client_mib",
        title="Peak memory (MiB)",
        unit="number",
        better="low",
        meaning="largest peak of a client's process; with `backend: local` that process is the server's too",
    ),
    Metric(key="wall_seconds", title="Time (s)", unit="number", better="low", meaning="wall time of all rounds"),
)
"""Measured on a machine, and never twice the same: kept out of the tables that two comparisons must agree on."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One finished run."""

    name: str
    strategy: str
    setting: str
    seed: int
    figures: dict[str, float | None]
    """By the key of a metric; None where it was not measured (or the target not reached)."""
    measured: dict[str, float | None]
    curve: tuple[tuple[int, float, int], ...]
    """(round, accuracy, bytes sent both ways so far) of every evaluation of the global model."""
    own: dict[str, float]
    """Accuracy on its own test data by client."""
    personalised: dict[str, float]
    load: tuple[tuple[int, ...], ...]
    """Client rounds that trained each expert, [L][E]."""
    rounds: int
    model_sha256: str


def read_outcome(run_dir: Path, *, strategy: str, setting: str, seed: int) -> Outcome:
    """Reads a finished run.

    Raises:
        CheckpointError: `run_dir` holds no run, or a damaged one.
    """
    run = read_run(run_dir)
    load = _load(run.rounds)
    training = [report for report in run.rounds if any(map(any, report.selected))]
    trained = [sum(count > 0 for row in report.selected for count in row) for report in training]
    figures: dict[str, Any] = {metric.key: run.summary.get(metric.key) for metric in METRICS}
    figures["rounds_to_own_target"] = _rounds_to_own_target(run)
    figures["load_cv"] = coefficient_of_variation([count for row in load for count in row])
    figures["experts_a_round"] = sum(trained) / len(trained) if trained else None
    return Outcome(
        name=run.name,
        strategy=strategy,
        setting=setting,
        seed=seed,
        figures=figures,
        measured={metric.key: run.summary.get(metric.key) for metric in MEASURED},
        curve=_curve(run),
        own=dict(run.summary.get("own_accuracy_by_client") or {}),
        personalised=dict(run.summary.get("personalised_accuracy_by_client") or {}),
        load=load,
        rounds=len(training),
        model_sha256=str(run.summary.get("model_sha256", "")),
    )


def coefficient_of_variation(counts: Sequence[float]) -> float | None:
    """Standard deviation over mean, of the whole population; None where nothing was counted."""
    total = sum(counts)
    if not total:
        return None
    mean = total / len(counts)
    return float((sum((count - mean) ** 2 for count in counts) / len(counts)) ** 0.5 / mean)


def _rounds_to_own_target(run: RunRecord) -> int | None:
    """None where it was not reached, there is no target, or only the last round was measured."""
    target = run.summary.get("target")
    own = [(report.round, report.own_accuracy) for report in run.rounds if report.own_accuracy is not None]
    if target is None or len(own) < 2:
        return None
    return next((round for round, accuracy in own if accuracy >= target), None)


def _load(rounds: Sequence[RoundReport]) -> tuple[tuple[int, ...], ...]:
    every = [report.selected for report in rounds]
    return tuple(tuple(sum(cells) for cells in zip(*rows, strict=True)) for rows in zip(*every, strict=True))


def _curve(run: RunRecord) -> tuple[tuple[int, float, int], ...]:
    sent = accumulate(report.bytes_up + report.bytes_down for report in run.rounds)
    pairs = zip(run.rounds, sent, strict=True)
    return tuple((one.round, one.accuracy, total) for one, total in pairs if one.accuracy is not None)
