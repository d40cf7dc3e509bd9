"""Measures what training costs: a few tasks of a real worker in a fresh process, and numbers fitted to them.

The points differ in the experts a client holds and in the examples that pass at once; everything else (model, form,
precision, text lengths, the prefix cache) is the experiment's own, so nothing has to be guessed.
The quickstart takes half a minute.
"""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls

from hfedmoe_ray import calibration
from hfedmoe_ray.budget import active_experts, expert_counts, tier_of
from hfedmoe_ray.calibration import Calibration, Cost
from hfedmoe_ray.config.schema import Experiment, Tier
from hfedmoe_ray.config.strategies import ActiveExperts, Placement
from hfedmoe_ray.context import RunContext
from hfedmoe_ray.data.dataset import FederatedDataset
from hfedmoe_ray.data.lengths import Lengths
from hfedmoe_ray.train.environment import inherited
from hfedmoe_ray.types import AbsentMode, ClientTask, ExpertPlan, ModelShape, Role, TaskKind, TaskWeights
from hfedmoe_ray.wire import parse_metrics

_STEPS = 8
"""At most so many. From the second step on, weights, gradients, optimizer state and activations are alive together,
but the allocator's pieces go on growing for some more."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement."""

    resident: int
    share: float
    examples: int
    peak: float
    """Bytes above the idle process."""
    step: float
    """Seconds of an optimizer step."""


def calibrate(context: RunContext, *, gpu: bool) -> None:
    """Measures every kind of client in an experiment, and keeps the results in the cache.

    Args:
        context: A prepared run.
        gpu: Whether its clients compute on GPUs.
    """
    experiment, shape = context.experiment, context.model.shape
    inhabited = {tier.name: tier for tier in tier_of(experiment.clients)}.values()
    kinds = {calibration.path_of(calibration.setting(experiment, tier, shape, gpu=gpu)): tier for tier in inhabited}
    for tier in kinds.values():
        with inherited(), ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            points = fresh.submit(measure, context, tier).result()
        calibration.write(experiment, tier, shape, fit(points, tokens_measured(context, tier)), gpu=gpu)


def measure(context: RunContext, tier: Tier) -> list[Point]:
    """Trains at four points in this process, which should be a fresh one with a client's environment."""
    from hfedmoe_ray.moe.prepare import initial_weights
    from hfedmoe_ray.train.local import ClientWorker
    from hfedmoe_ray.train.memory import MIB, private_bytes, return_freed_memory

    experiment, shape, client = context.experiment, context.model.shape, _client(context, tier)
    weights = initial_weights(context.model, experiment.model.trainable, experiment.model.lora, experiment.seed)

    def costs(worker: ClientWorker, task: ClientTask) -> tuple[float, float]:
        """Peak in bytes, and seconds of the steps."""
        experts = {key: weights.experts[key] for key in task.plan.present}
        needed = TaskWeights(shared=weights.shared, experts=experts, means=weights.means)
        return_freed_memory()  # of the point before
        _, answer, _ = worker.execute(task, needed, lambda: False)
        metrics = parse_metrics(answer)
        return metrics.peak_mib * MIB, metrics.step_seconds

    worker = ClientWorker(context)
    idle = private_bytes() if worker.device.type == "cpu" else 0
    # A client's process has served others before: their tasks leave something behind in it (libraries' own caches).
    for kind in ("profile", "evaluate"):
        costs(worker, _task(experiment, shape, client, 0, kind=kind, absent=Role.FROZEN))
    points = []
    for examples in _examples(experiment, tier):
        passing = _passing(experiment, tier, examples)
        worker = ClientWorker(replace(context, experiment=passing))
        for held, top_k in _held(experiment, shape):
            task = _task(experiment, shape, client, held, absent=_unselected(experiment), top_k=top_k)
            resident, share = len(task.plan.trainable), len(task.plan.present) / shape.total_experts
            share *= (top_k or shape.top_k) / shape.top_k
            peak, seconds = costs(worker, task)
            step = seconds / passing.local.steps
            points.append(Point(resident=resident, share=share, examples=examples, peak=peak - idle, step=step))
    return points


def train_once(context: RunContext, tier: Tier, steps: int) -> float:
    """Returns the peak of the own memory, in MiB, of a client of a tier that trains what the tier's budget holds.

    Measured in this process, which should be a fresh one with a client's environment: its first task of each kind.

    Args:
        context: A prepared run.
        tier: Of the client.
        steps: Optimizer steps, at most those of a round.
    """
    from hfedmoe_ray.moe.prepare import initial_weights
    from hfedmoe_ray.train.local import ClientWorker
    from hfedmoe_ray.train.memory import MIB, private_bytes

    experiment, shape, client = context.experiment, context.model.shape, _client(context, tier)
    local = experiment.local.model_copy(update={"steps": min(experiment.local.steps, steps)})
    worker = ClientWorker(replace(context, experiment=experiment.model_copy(update={"local": local})))
    before = private_bytes()
    weights = initial_weights(context.model, experiment.model.trainable, experiment.model.lora, experiment.seed)
    published = private_bytes() - before  # which clients read from the object store
    unselected, (resident, _) = _unselected(experiment), expert_counts(tier, shape)
    top_k = None
    if isinstance(experiment.strategy, ActiveExperts):
        resident, top_k = shape.total_experts, active_experts(experiment.strategy, resident, shape)
    peak = 0.0
    kinds: tuple[tuple[TaskKind, int, Role], ...] = (
        ("profile", 0, Role.FROZEN),
        ("evaluate", 0, Role.FROZEN),
        ("train", resident, unselected),
    )
    for kind, held, rest in kinds:
        task = _task(experiment, shape, client, 0, kind=kind, absent=rest, top_k=top_k)
        # Spread over the layers: as many in each, and the first layers one more.
        each, more = divmod(held, shape.layers)
        roles = tuple(
            tuple(Role.TRAIN if expert < each + (layer < more) else rest for expert in range(shape.experts))
            for layer in range(shape.layers)
        )
        # One batch of the client's examples is enough to evaluate: it reads as much as any.
        batches = max(1, sum(context.data.counts[client]) // experiment.evaluate.batch_size)
        part = (0, batches) if kind == "evaluate" else task.part
        task = replace(task, plan=replace(task.plan, roles=roles), part=part)
        needed = TaskWeights(
            shared=weights.shared,
            experts={key: weights.experts[key] for key in task.plan.present},
            means=weights.means,
        )
        _, answer, _ = worker.execute(task, needed, lambda: False)
        peak = parse_metrics(answer).peak_mib
    return peak - published / MIB


def tokens_measured(context: RunContext, tier: Tier) -> float:
    """Returns the tokens that an example had in the largest batch that `measure` saw, padding included."""
    split = FederatedDataset(context.data, context.experiment.data).train(_client(context, tier))
    examples = _examples(context.experiment, tier)[-1]
    steps = min(context.experiment.local.steps, _STEPS)
    tokens, _ = Lengths(texts=np.asarray(split.lengths)).batch(examples, steps)
    return tokens / examples


def fit(points: Sequence[Point], tokens: float) -> Calibration:
    """The numbers, none of them negative, that explain the points best; `tokens` is `tokens_measured`."""
    rows = np.array([(1, one.resident, one.examples, one.examples * one.share) for one in points], float)
    unit = np.abs(rows).max(axis=0)

    def cost(values: Sequence[float]) -> Cost:
        numbers, _ = nnls(rows / unit, np.array(values))
        fixed, expert, example, routed = map(float, numbers / unit)
        return Cost(fixed=fixed, expert=expert, example=example, routed=routed)

    return Calibration(peak=cost([one.peak for one in points]), step=cost([one.step for one in points]), tokens=tokens)


def _client(context: RunContext, tier: Tier) -> int:
    """The client of a tier with the most examples."""
    of_tier = [client for client, own in enumerate(tier_of(context.experiment.clients)) if own.name == tier.name]
    return max(of_tier, key=lambda client: sum(context.data.counts[client]))


def _examples(experiment: Experiment, tier: Tier) -> tuple[int, int]:
    """Examples that pass at once: half as many as the experiment says, and as many."""
    at_once = max(2, calibration.examples_at_once(experiment, tier))
    return at_once // 2, at_once


def _held(experiment: Experiment, shape: ModelShape) -> list[tuple[int, int | None]]:
    """Experts a layer that train, and the top-k: as little as any client has, and as much (at least two)."""
    strategy, tiers = experiment.strategy, experiment.clients.tiers
    if isinstance(strategy, ActiveExperts):
        most = max(active_experts(strategy, expert_counts(tier, shape)[0], shape) for tier in tiers)
        return [(shape.experts, top_k) for top_k in (1, min(max(2, most), shape.experts))]
    largest = max(tier.experts for tier in tiers)
    return [(held, None) for held in (1, max(2, round(largest * shape.experts)))]


def _passing(experiment: Experiment, tier: Tier, examples: int) -> Experiment:
    """The experiment with so many examples in a batch, which pass at once."""
    undivided = tier.model_copy(update={"micro_batch": None})
    tiers = tuple(undivided if other.name == tier.name else other for other in experiment.clients.tiers)
    return experiment.model_copy(
        update={
            "clients": experiment.clients.model_copy(update={"tiers": tiers}),
            "local": experiment.local.model_copy(
                update={"batch_size": examples, "steps": min(experiment.local.steps, _STEPS)}
            ),
        }
    )


def _unselected(experiment: Experiment) -> Role:
    """What the strategy makes of experts that a client does not train."""
    strategy = experiment.strategy
    frozen = not isinstance(strategy, Placement) or strategy.resident == "all" or strategy.unselected == "frozen"
    return Role.FROZEN if frozen else Role.ABSENT


def _task(
    experiment: Experiment,
    shape: ModelShape,
    client: int,
    held: int,
    *,
    absent: Role,
    kind: TaskKind = "train",
    top_k: int | None = None,
) -> ClientTask:
    """A client that trains the first `held` experts of every layer."""
    row = tuple(Role.TRAIN if expert < held else absent for expert in range(shape.experts))
    mode: AbsentMode = experiment.strategy.deployed if isinstance(experiment.strategy, Placement) else "mean"
    plan = ExpertPlan(roles=(row,) * shape.layers, absent=mode, top_k=top_k)
    return ClientTask(kind=kind, round=1, client=client, seed=experiment.seed, plan=plan, version=0)
