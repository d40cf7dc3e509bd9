"""Honest answers of clients of a tiny model, in every precision: what mutations start from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from hfedmoe_ray.config.wire import Wire
from hfedmoe_ray.federation.validation import Rejected, accept
from hfedmoe_ray.trust.limits import Limits
from hfedmoe_ray.types import (
    Array,
    ClientMetrics,
    ClientTask,
    ExpertKey,
    ExpertPlan,
    Prototypes,
    Role,
    RoutingProfile,
    Signal,
    TaskKind,
    TaskResult,
    TaskWeights,
    Weights,
)
from hfedmoe_ray.wire import checksum, dump_metrics, expert_name, make_upload, pack_update, parse_metrics

LAYERS, EXPERTS, HIDDEN, CLASSES = 2, 3, 4, 2
ROLES = ((Role.TRAIN, Role.FROZEN, Role.ABSENT), (Role.TRAIN, Role.TRAIN, Role.ABSENT))
LIMITS = Limits(samples=50, steps=3, tokens=1000)
SHAPES = {"up.weight": (6, HIDDEN), "down": (HIDDEN, 6), "bias": (HIDDEN,)}
WIRES = {
    "fp32": Wire(),
    "bf16": Wire(upload="bf16"),
    "fp16": Wire(upload="fp16", error_feedback=True),
    "int8": Wire(upload="int8"),
    "topk": Wire(upload="topk", share=0.2),
}


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What a client leaves of a task."""

    body: bytes
    """Metrics."""
    payload: bytes
    state_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Case:
    """A task and honest answers: to it, to the one of the round before, and another client's."""

    name: str
    task: ClientTask
    weights: Weights
    wire: Wire
    signals: tuple[Signal, ...]
    honest: Sent
    earlier: Sent
    other: Sent


def receive(case: Case, sent: Sent) -> str:
    """What the server does with an answer, as executors and the collector do: "" if accepted, else the reason.

    Raises whatever else than `Rejected` the server would meet.
    """
    try:
        metrics = parse_metrics(sent.body)
    except ValueError as error:
        return f"metrics: {error}"
    result = TaskResult(
        task=case.task,
        status="ok",
        metrics=metrics,
        payload=lambda: sent.payload,
        payload_bytes=len(sent.payload),
        state_bytes=sent.state_bytes,
    )
    try:
        accept(result, case.task.plan, case.weights, case.wire, case.signals, limits=LIMITS)
    except Rejected as rejection:
        return str(rejection)
    return ""


def cases() -> list[Case]:
    """Training in every precision, with and without signals and scales, and profiling with class prototypes."""
    made = [_case(name, "train", wire) for name, wire in WIRES.items()]
    made += [_case("signals", "train", WIRES["fp32"], ("accuracy", "gradient", "loss"), scale=(1.0, 0.5))]
    return [*made, *(_case(f"profile-{name}", "profile", WIRES[name]) for name in ("fp32", "int8"))]


def published(seed: int) -> Weights:
    """Weights as a round might publish them."""
    rng = np.random.default_rng(seed)
    shared = {"gate.0": (EXPERTS, HIDDEN), "gate.1": (EXPERTS, HIDDEN), "head": (CLASSES, HIDDEN), "bias": (CLASSES,)}
    return Weights(
        version=seed,
        shared={name: _normal(rng, shape) for name, shape in shared.items()},
        experts={
            ExpertKey(layer, e): {name: _normal(rng, shape) for name, shape in SHAPES.items()}
            for layer in range(LAYERS)
            for e in range(EXPERTS)
        },
        means=_normal(rng, (LAYERS, EXPERTS, HIDDEN)),
    )


def _case(
    name: str,
    kind: TaskKind,
    wire: Wire,
    signals: tuple[Signal, ...] = (),
    scale: tuple[float, ...] | None = None,
) -> Case:
    roles = ROLES if kind == "train" else tuple(tuple(Role.FROZEN for _ in row) for row in ROLES)
    plan = ExpertPlan(roles=roles, scale=scale)
    task = ClientTask(kind=kind, round=2, client=1, seed=0, plan=plan, version=2)
    weights = published(2)
    before = replace(task, round=1, version=1)
    return Case(
        name=name,
        task=task,
        weights=weights,
        wire=wire,
        signals=signals,
        honest=_answer(task, weights, wire, signals),
        earlier=_answer(before, published(1), wire, signals),
        other=_answer(replace(task, client=3), weights, wire, signals),
    )


def _answer(task: ClientTask, weights: Weights, wire: Wire, signals: tuple[Signal, ...]) -> Sent:
    """What an honest client sends; of the experts that it may train, the last gets no step."""
    rng = np.random.default_rng([task.round, task.client])
    plan = task.plan
    usage = rng.dirichlet(np.ones(EXPERTS), LAYERS)
    profile = RoutingProfile(
        usage=usage,
        specific=np.minimum(usage * 2, 1.0),
        kl=usage * 0.1,
        routed=np.floor(usage * 90),
        tokens=90,
    )
    means = {key: _normal(rng, (HIDDEN,)) for key in plan.present}
    metrics = ClientMetrics(
        client=task.client,
        round=task.round,
        kind=task.kind,
        samples=12,
        tokens=90,
        loss=1.5,
        examples=12,
        seconds=0.5,
    )
    if task.kind == "profile":
        sums = _normal(rng, (CLASSES, HIDDEN))
        prototypes = Prototypes(sums=sums, counts=np.array([7, 5], np.float32))
        payload = pack_update({}, {}, profile, means, prototypes, lossy=wire.lossy)
        return Sent(body=dump_metrics(metrics), payload=payload)
    trained = {key: _stepped(weights.experts[key], rng) for key in plan.trainable[:-1]}
    upload = make_upload(
        wire,
        TaskWeights(shared=weights.shared, experts=weights.experts),
        trained,
        _stepped(weights.shared, rng),
        profile=profile,
        means=means,
        signals={signal: rng.random((LAYERS, EXPERTS)) for signal in signals},
    )
    metrics = replace(
        metrics,
        trained={expert_name(key): 2 for key in trained},
        before={expert_name(key): checksum(weights.experts[key]) for key in plan.trainable},
        after={expert_name(key): checksum(trained.get(key, weights.experts[key])) for key in plan.trainable},
        rebuilt=upload.rebuilt,
        scale=tuple(1.5 * scale for scale in plan.scale or ()),
    )
    return Sent(body=dump_metrics(metrics), payload=upload.payload, state_bytes=len(upload.state))


def _stepped(start: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    return {name: value + np.float32(1e-2) * _normal(rng, value.shape) for name, value in start.items()}


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return rng.normal(size=shape).astype(np.float32)
