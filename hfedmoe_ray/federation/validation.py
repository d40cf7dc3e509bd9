"""What an update must satisfy before it is averaged, and the proof that it trained what it claims.

`check_update` rejects what a faulty or hostile client may send; such a client is left out and the round goes on.
`check_canary` finds faults of the framework itself - an expert that was to train and did not, or moved without being
told to - and those stop the run: experts that silently never train are this field's commonest bug.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np

from hfedmoe_ray.config.wire import Wire
from hfedmoe_ray.errors import TrainingError
from hfedmoe_ray.types import (
    Array,
    ClientMetrics,
    ClientUpdate,
    ExpertPlan,
    RoutingProfile,
    Signal,
    TaskResult,
    TaskWeights,
    Weights,
)
from hfedmoe_ray.wire import PROFILE_FIELDS, checksum, expert_key, expert_name, read_upload, unpack_update

_ABSURD = 100.0
"""So many times the norm of what it started from no update reaches by training (ours). Training scales weights by a
few percent; this is to catch what is finite and would still be all that is left of an average."""


class Rejected(Exception):
    """An update that must not be averaged; the message is the reason, in one line."""


def accept(
    result: TaskResult, plan: ExpertPlan, weights: Weights, wire: Wire, signals: Collection[Signal] = ()
) -> ClientUpdate:
    """Fetches, parses and checks the update of a task that ended well.

    Args:
        result: How the task ended.
        plan: What the client was given to do.
        weights: The weights it started from.
        wire: How updates travel in this run.
        signals: What it was asked to measure of each expert while it trained.

    Raises:
        Rejected: It must not be used.
        TrainingError: It was not trained as planned (see `check_canary`).
    """
    metrics = result.metrics
    if metrics is None or result.payload is None:
        raise Rejected("delivered no update")
    if (metrics.client, metrics.round, metrics.kind) != (result.task.client, result.task.round, result.task.kind):
        raise Rejected(f"answers for client {metrics.client}, round {metrics.round}, {metrics.kind}")
    try:
        update = read_upload(result.payload(), metrics, wire, weights)
    except ValueError as error:
        raise Rejected(f"cannot be read: {error}") from error
    check_update(update, plan, weights, trains=result.task.kind == "train")
    asked = set(signals) if result.task.kind == "train" else set()
    if set(update.signals) != asked:
        raise Rejected(f"measured {sorted(update.signals)} of each expert, not {sorted(asked)}")
    if result.task.kind == "train":
        check_canary(update, metrics, plan, weights, lossy=wire.lossy)
    return update


def accept_masked(result: TaskResult, *, profiled: bool) -> ClientUpdate:
    """Fetches a masked count of experts and checks what can be: that it has the numbers it was asked for.

    Args:
        result: How the task ended.
        profiled: Whether the client's routing profile is sent beside it, in the clear.

    Raises:
        Rejected: It must not be added.
    """
    from hfedmoe_ray.trust.secure.messages import read_vector  # with cryptography, which is an extra
    from hfedmoe_ray.trust.secure.server import Sum

    metrics, request = result.metrics, result.task.secure
    assert request is not None and request.layout is not None
    if metrics is None or result.payload is None:
        raise Rejected("delivered no update")
    if (metrics.client, metrics.round, metrics.kind) != (result.task.client, result.task.round, result.task.kind):
        raise Rejected(f"answers for client {metrics.client}, round {metrics.round}, {metrics.kind}")
    if metrics.samples <= 0:
        raise Rejected(f"claims {metrics.samples} training examples")
    payload = result.payload()
    blocks = request.layout.presence()
    try:
        masked, rest = read_vector(payload, len(blocks))
        Sum(request.session, blocks).check(result.task.client, masked)
        beside = unpack_update(rest, metrics)
    except ValueError as error:
        raise Rejected(f"cannot be read: {error}") from error
    if (beside.profile is not None) != profiled:
        raise Rejected("holds no routing profile" if profiled else "holds a routing profile, which nobody asked for")
    if beside.profile is not None:
        _check_profile(beside.profile, request.layout.shape)
    return replace(beside, masked=tuple(masked), payload_bytes=len(payload))


def check_update(update: ClientUpdate, plan: ExpertPlan, weights: Weights, *, trains: bool) -> None:
    """Checks that an update holds assigned experts only, in the right shapes, and finite numbers.

    Args:
        update: The parsed update.
        plan: What the client was given to do.
        weights: The weights it started from.
        trains: Whether shared parameters belong into it.

    Raises:
        Rejected: With the first reason found.
    """
    assigned = set(plan.trainable)
    if update.samples <= 0:
        raise Rejected(f"claims {update.samples} training examples")
    for key, steps in update.trained.items():
        if key not in assigned:
            raise Rejected(f"claims to have trained expert {expert_name(key)}, which it was not assigned")
        if steps <= 0:
            raise Rejected(f"claims {steps} steps for expert {expert_name(key)}")
    if set(update.experts) != set(update.trained):
        raise Rejected("the experts sent are not the experts it says it trained")
    for key, tensors in update.experts.items():
        _check_tensors(tensors, weights.experts[key], f"expert {expert_name(key)}")
    _check_tensors(update.shared, weights.shared if trains else {}, "shared parameters")
    _check_norm(update, weights)
    _check_statistics(update, plan, weights)


def _check_statistics(update: ClientUpdate, plan: ExpertPlan, weights: Weights) -> None:
    """Checks what a client measured: mean outputs, class prototypes, routing profile."""
    present = set(plan.present)
    for key, (mean, _) in update.means.items():
        if key not in present:
            raise Rejected(f"sends the mean output of expert {expert_name(key)}, which it does not hold")
        if weights.means is None or mean.shape != weights.means[key].shape or not np.isfinite(mean).all():
            raise Rejected(f"the mean output of expert {expert_name(key)} has a wrong shape or is not finite")
    if update.prototypes is not None:
        sums, counts = update.prototypes.sums, update.prototypes.counts
        head_shapes = {value.shape for value in weights.shared.values() if value.ndim == 2}
        if sums.shape not in head_shapes or counts.shape != sums.shape[:1]:
            raise Rejected("the class prototypes do not have the task head's shape")
        if not np.isfinite(sums).all() or not (np.isfinite(counts) & (counts >= 0)).all():
            raise Rejected("the class prototypes hold NaN, infinity or negative counts")
    scales = len(plan.scale or ())
    if len(update.scale) != scales or not np.isfinite(update.scale).all():
        raise Rejected(f"sends {len(update.scale)} output scales or not finite ones, where {scales} were to train")
    if update.profile is None:
        raise Rejected("holds no routing profile")
    shape = (len(plan.roles), len(plan.roles[0]))
    for signal, value in update.signals.items():
        if value.shape != shape or value.dtype != np.float64 or not np.isfinite(value).all() or (value < 0).any():
            raise Rejected(f"its {signal} of each expert has a wrong shape or type, or is negative or not finite")
    _check_profile(update.profile, shape)


def _check_profile(profile: RoutingProfile, shape: tuple[int, int]) -> None:
    for name in PROFILE_FIELDS:
        value = getattr(profile, name)
        if value.shape != shape or not np.isfinite(value).all():
            raise Rejected(f"the routing profile's {name} has a wrong shape or is not finite")


def _check_tensors(sent: Mapping[str, Array], expected: Mapping[str, Array], what: str) -> None:
    if set(sent) != set(expected):
        wrong = sorted(set(sent) ^ set(expected))
        raise Rejected(f"{what}: unexpected or missing {', '.join(wrong[:3])}")
    for name, value in sent.items():
        if value.shape != expected[name].shape or value.dtype != expected[name].dtype:
            raise Rejected(
                f"{what}: {name} is {value.dtype} {list(value.shape)}, "
                f"expected {expected[name].dtype} {list(expected[name].shape)}"
            )
        if not np.isfinite(value).all():
            raise Rejected(f"{what}: {name} holds NaN or infinity")


def _check_norm(update: ClientUpdate, weights: Weights) -> None:
    """Checks that all that is sent together is not larger than training can make it.

    Together, since single tensors may start at zero, as half of all low-rank factors do.
    """
    sent = _norm([update.shared, *update.experts.values()])
    started = _norm(
        [{name: weights.shared[name] for name in update.shared}, *(weights.experts[key] for key in update.experts)]
    )
    if not sent <= _ABSURD * max(started, 1.0):
        raise Rejected(f"its weights have the norm {sent:.3g}, more than {_ABSURD:g} times the {started:.3g} before")


def _norm(parts: Iterable[Mapping[str, Array]]) -> float:
    """The Euclidean norm of all tensors as one vector; infinity where fp32 cannot hold its square."""
    with np.errstate(over="ignore"):
        return math.hypot(*(float(np.linalg.norm(value)) for tensors in parts for value in tensors.values()))


def check_canary(
    update: ClientUpdate,
    metrics: ClientMetrics,
    plan: ExpertPlan,
    weights: Weights | TaskWeights,
    *,
    lossy: bool = False,
) -> None:
    """Proves what was trained, from checksums before and after.

    Every trainable expert must have started from the published bytes; one that took a step must have changed and
    been sent as it stood, or, where the upload is lossy, arrive as the client knows it to; one that took none must be
    unchanged.

    Raises:
        TrainingError: If any of this does not hold.
    """
    assigned = {expert_name(key) for key in plan.trainable}
    if set(metrics.before) != assigned or set(metrics.after) != assigned:
        raise TrainingError(_told(metrics, "did not report a checksum for each of its trainable experts"))
    for name in sorted(assigned):
        key = expert_key(name)
        started, ended = metrics.before[name], metrics.after[name]
        if started != checksum(weights.experts[key]):
            raise TrainingError(_told(metrics, f"started expert {name} from other weights than those published"))
        if key in update.experts:
            if started == ended:
                raise TrainingError(_told(metrics, f"took {update.trained[key]} steps on expert {name}, unchanged"))
            arrived = checksum(update.experts[key])
            if lossy and arrived != metrics.rebuilt.get(name):
                raise TrainingError(_told(metrics, f"sent expert {name} other than it arrived"))
            if not lossy and arrived != ended:
                raise TrainingError(_told(metrics, f"sent expert {name} other than it stood after training"))
        elif started != ended:
            raise TrainingError(_told(metrics, f"changed expert {name} without a step on it"))


def _told(metrics: ClientMetrics, fact: str) -> str:
    return (
        f"round {metrics.round}: client {metrics.client} {fact}. The round would average weights that were not "
        "trained as planned, so the run stops; this is a fault in the framework or in a custom strategy or layout."
    )
