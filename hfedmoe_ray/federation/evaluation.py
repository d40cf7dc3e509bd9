"""Measuring a round's model: the global one on the global test split, and each client's on its own."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import TrainingError
from hfedmoe_ray.records import BenchmarkScore
from hfedmoe_ray.strategies import AnyStrategy
from hfedmoe_ray.strategies.scores import uniform_plan
from hfedmoe_ray.types import ClientInfo, ClientMetrics, ClientTask, ExpertPlan, Role, TaskResult, Weights

_PARTS = 8
"""Slices of the global test split: a fixed number, so that results do not depend on how many slots there are."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a round's evaluation found; None where it was not due."""

    accuracy: float | None = None
    loss: float | None = None
    own: Mapping[int, float] = field(default_factory=dict)
    """Accuracy of each client on its own test split."""
    personalised: Mapping[int, float] = field(default_factory=dict)
    """The same after a local training round."""
    benchmarks: Mapping[str, BenchmarkScore] = field(default_factory=dict)
    """What the global model answered, by benchmark."""
    backdoor: float | None = None
    """Where an attack leaves a backdoor: share of the global test split's examples of other labels than its target to
    which the global model gives that target once they carry the trigger."""

    @property
    def own_accuracy(self) -> float | None:
        """Mean over clients."""
        return mean_accuracy(self.own)

    @property
    def personalised_accuracy(self) -> float | None:
        """Mean over clients."""
        return mean_accuracy(self.personalised)


def mean_accuracy(accuracies: Mapping[int, float]) -> float | None:
    """Mean over clients; None of none."""
    return sum(accuracies.values()) / len(accuracies) if accuracies else None


def worst_tenth(accuracies: Mapping[int, float]) -> float | None:
    """Mean of the tenth of the clients (at least one) that fares worst."""
    worst = sorted(accuracies.values())[: math.ceil(len(accuracies) / 10)]
    return sum(worst) / len(worst) if worst else None


def variance(accuracies: Mapping[int, float]) -> float | None:
    """Variance over clients: how unequally a model serves them (0: all alike)."""
    mean = mean_accuracy(accuracies)
    return None if mean is None else sum((value - mean) ** 2 for value in accuracies.values()) / len(accuracies)


def evaluation_tasks(experiment: Experiment, round: int, strategy: AnyStrategy, weights: Weights) -> list[ClientTask]:
    """Returns tasks that together evaluate the whole model on the global test split, each example once.

    Where an attack leaves a backdoor, on that split with its trigger too.

    Without federation there is no global model: each client's own model takes an equal slice, which estimates the
    mean accuracy of the clients' models at the cost of one evaluation (before any training all are the same model).
    """
    private = {} if strategy.federated else weights.personal or {}
    owners: list[int | None] = [*sorted(private)] or [None] * _PARTS
    plan = uniform_plan(strategy.shape, Role.FROZEN)
    attack = experiment.attack
    splits: list[Literal["global_test", "backdoor"]] = ["global_test"]
    if attack is not None and attack.kind == "backdoor":
        splits.append("backdoor")
    return [
        ClientTask(
            kind="evaluate",
            round=round,
            client=index % experiment.clients.count if owner is None else owner,
            seed=experiment.seed,
            plan=plan,
            version=weights.version,
            split=split,
            part=(index, len(owners)),
            personal=owner,
            weight=float(len(plan.present)),
        )
        for split in splits
        for index, owner in enumerate(owners)
    ]


def own_tasks(
    experiment: Experiment,
    round: int,
    strategy: AnyStrategy,
    weights: Weights,
    plans: Mapping[int, ExpertPlan],
    *,
    trains: Mapping[int, ClientInfo] | None = None,
) -> list[ClientTask]:
    """Returns a task per client that evaluates what it holds when it uses the model, on its own test split.

    Args:
        experiment: The run.
        round: The round that has ended.
        strategy: The run's.
        weights: As they are published.
        plans: What each client holds.
        trains: The clients, if they are to train by themselves first.
    """
    personal = weights.personal or {}
    return [
        ClientTask(
            kind="personalise" if trains else "evaluate",
            round=round,
            client=client,
            seed=experiment.seed,
            plan=_for_training(plan, trains[client]) if trains else _for_inference(plan),
            version=weights.version,
            split="own_test",
            personal=client if client in personal else None,
            weight=float(len(plan.present)),
        )
        for client, plan in plans.items()
        if strategy.federated or client in personal
    ]


def benchmark_tasks(experiment: Experiment, round: int, strategy: AnyStrategy, weights: Weights) -> list[ClientTask]:
    """Returns tasks that together ask the whole model every item of every benchmark once."""
    plan = uniform_plan(strategy.shape, Role.FROZEN)
    return [
        ClientTask(
            kind="evaluate",
            round=round,
            client=index % experiment.clients.count,
            seed=experiment.seed,
            plan=plan,
            version=weights.version,
            split="benchmark",
            benchmark=benchmark.name,
            part=(index, _PARTS),
            weight=float(len(plan.present)),
        )
        for benchmark in experiment.evaluate.benchmarks
        for index in range(_PARTS)
    ]


def _for_inference(plan: ExpertPlan) -> ExpertPlan:
    """The same experts held, none of them a private copy."""
    roles = tuple(tuple(min(role, Role.FROZEN) for role in row) for row in plan.roles)
    return replace(plan, roles=roles, batch_budget=None)


def _for_training(plan: ExpertPlan, client: ClientInfo) -> ExpertPlan:
    """The same experts held, to be trained: those with the role TRAIN within the batch budget, or else all."""
    if plan.trainable:
        return replace(plan, batch_budget=client.batch_experts)
    return replace(plan, roles=tuple(tuple(Role.TRAIN if role else Role.ABSENT for role in row) for row in plan.roles))


def summarise(results: Iterable[TaskResult]) -> Evaluation:
    """Adds up evaluation results, in the order of their tasks.

    Raises:
        TrainingError: A slice of the global test split is missing: an accuracy over the rest would mislead.
    """
    slices: dict[str, dict[int, ClientMetrics]] = {"global_test": {}, "backdoor": {}}
    own: dict[int, float] = {}
    personalised: dict[int, float] = {}
    answered: dict[str, list[ClientMetrics]] = {}
    for result in results:
        task, metrics = result.task, result.metrics
        if metrics is not None and not metrics.answers(task):
            metrics = None
        if task.split in slices:
            if metrics is None or result.status != "ok":
                raise TrainingError(
                    f"round {task.round}: evaluation of slice {task.part[0] + 1}/{task.part[1]} of the global test "
                    f"split is {result.status} ({result.reason}). The round is trained but could not be measured; "
                    "mend the cause and `hfedmoe resume`."
                )
            slices[task.split][task.part[0]] = metrics
        elif task.split == "benchmark":
            if metrics is None or result.status != "ok":
                raise TrainingError(
                    f"round {task.round}: slice {task.part[0] + 1}/{task.part[1]} of benchmark {task.benchmark} is "
                    f"{result.status} ({result.reason}). Mend the cause and `hfedmoe resume`."
                )
            answered.setdefault(task.benchmark, []).append(metrics)
        elif metrics is not None and metrics.examples:
            found = personalised if task.kind == "personalise" else own
            found[task.client] = metrics.correct / metrics.examples
    accuracy, loss = _whole(slices["global_test"])
    return Evaluation(
        accuracy=accuracy,
        loss=loss,
        own=dict(sorted(own.items())),
        personalised=dict(sorted(personalised.items())),
        benchmarks={name: _score(parts) for name, parts in answered.items()},
        backdoor=_whole(slices["backdoor"])[0],
    )


def _whole(slices: Mapping[int, ClientMetrics]) -> tuple[float | None, float | None]:
    """Accuracy and mean loss over the slices of a split; None without examples."""
    examples = sum(metrics.examples for metrics in slices.values())
    if not examples:
        return None, None
    loss = sum(slices[part].loss * slices[part].examples for part in sorted(slices) if slices[part].examples)
    return sum(metrics.correct for metrics in slices.values()) / examples, loss / examples


def _score(parts: Iterable[ClientMetrics]) -> BenchmarkScore:
    sums: Counter[str] = Counter()
    items = 0
    for part in parts:
        items += part.examples
        sums.update(part.answered)
    if "nll" in sums:
        counts = {unit: sums[f"{unit}s"] for unit in ("word", "byte", "token")}
        measures = {f"{unit}_perplexity": _exp(sums["nll"] / max(count, 1)) for unit, count in counts.items()}
    else:
        measures = {name: right / max(items, 1) for name, right in sums.items()}
    return BenchmarkScore(items=items, measures=measures)


def _exp(value: float) -> float:
    """E to a power; infinite beyond what a float holds."""
    return math.exp(value) if value < 700 else math.inf
