"""What an update must satisfy before it is averaged, and the proof that it trained what it claims.

`accept` rejects what a faulty or hostile client may send; such a client is left out and the round goes on. First comes
what costs nothing: what it says of itself, and the size of what it sends. Then the bytes are read, then the numbers.

Checksums that do not fit (`check_canary`) reject an update like anything else. They are also how faults of the
framework itself show - experts that silently never train are this field's commonest bug - and such a fault is not one
client's: where the same is found at enough clients of a round, `federation.quorum` stops the run.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np

from hfedmoe_ray.config.wire import Wire
from hfedmoe_ray.trust.foreign_text import one_line
from hfedmoe_ray.trust.limits import UNLIMITED, Limits, most_masked_bytes, most_payload_bytes, most_state_bytes
from hfedmoe_ray.types import (
    Array,
    ClientMetrics,
    ClientUpdate,
    ExpertKey,
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
_LARGEST_OUTPUT = 1e6
"""Of a number in a mean output or in the features of an example: the largest activations known are thousands."""
_LARGEST_SIGNAL = 1e30
"""Of a loss or squared gradient: sums of such over any cohort are finite."""
_ROUNDING = 1e-2
"""By how much a gate value, or the sum of a layer's, may leave 0..1."""


class Rejected(Exception):
    """An update that must not be averaged; the message is the reason, in one line."""

    def __init__(self, reason: str) -> None:
        """Takes a reason, in which names may stand that the client gave."""
        super().__init__(one_line(reason))


class NotAsTrained(Rejected):
    """An update whose checksums do not fit: its client is at fault, or the framework is."""

    def __init__(self, fact: str, experts: Collection[ExpertKey], told: str) -> None:
        """Takes note of what does not fit.

        Args:
            fact: What it is, in words that are the same for all clients and experts.
            experts: Where; all that were to train where it is not about one.
            told: The fact with the expert's name.
        """
        super().__init__(f"{told}: it was not trained as planned")
        self.fact = fact
        self.experts = frozenset(experts)


def accept(
    result: TaskResult,
    plan: ExpertPlan,
    weights: Weights,
    wire: Wire,
    signals: Collection[Signal] = (),
    *,
    limits: Limits = UNLIMITED,
) -> ClientUpdate:
    """Fetches, parses and checks the update of a task that ended well.

    Args:
        result: How the task ended.
        plan: What the client was given to do.
        weights: The weights it started from.
        wire: How updates travel in this run.
        signals: What it was asked to measure of each expert while it trained.
        limits: The most that it can truthfully claim.

    Raises:
        Rejected: It must not be used.
        NotAsTrained: Nor must this, and it may be our fault (see `check_canary`).
    """
    metrics, trains = result.metrics, result.task.kind == "train"
    if metrics is None or result.payload is None:
        raise Rejected("delivered no update")
    if not metrics.answers(result.task):
        raise Rejected(f"answers for client {metrics.client}, round {metrics.round}, {metrics.kind}")
    asked = set(signals) if trains else set()
    _check_claims(metrics, plan, limits)
    most = most_payload_bytes(plan, weights, wire, asked, trains=trains)
    _check_size("update", result.payload_bytes, most)
    _check_size("state", result.state_bytes, most_state_bytes(weights, wire))
    payload = result.payload()
    _check_size("update", len(payload), most)
    try:
        update = read_upload(payload, metrics, wire, weights)
    except ValueError as error:
        raise Rejected(f"cannot be read: {error}") from error
    check_update(update, plan, weights, trains=trains, limits=limits)
    if set(update.signals) != asked:
        raise Rejected(f"measured {sorted(update.signals)} of each expert, not {sorted(asked)}")
    if trains:
        check_canary(update, metrics, plan, weights, lossy=wire.lossy)
    elif metrics.before or metrics.after or metrics.rebuilt:
        raise Rejected("reports checksums of experts, and was not to train")
    return update


def _check_claims(metrics: ClientMetrics, plan: ExpertPlan, limits: Limits) -> None:
    """Checks what a client says of itself, before anything that it sends is looked at."""
    if metrics.samples > limits.samples:
        raise Rejected(f"claims {metrics.samples} training examples, and can have {limits.samples:g} at most")
    if metrics.tokens > limits.tokens:
        raise Rejected(f"claims {metrics.tokens} tokens, and can have seen {limits.tokens:g} at most")
    assigned = {expert_name(key) for key in plan.trainable}
    for name, steps in metrics.trained.items():
        if name not in assigned:
            raise Rejected(f"claims to have trained expert {name[:20]}, which it was not assigned")
        if steps > limits.steps:
            raise Rejected(f"claims {steps} steps for expert {name}, and was to take {limits.steps:g} at most")


def _check_size(what: str, size: int, most: int) -> None:
    if size > most:
        raise Rejected(f"its {what} is {size} bytes, and can be {most} at most")


def accept_masked(result: TaskResult, *, profiled: bool, limits: Limits) -> ClientUpdate:
    """Fetches a masked count of experts and checks what can be: that it has the numbers it was asked for.

    Args:
        result: How the task ended.
        profiled: Whether the client's routing profile is sent beside it, in the clear.
        limits: The most that it can truthfully claim.

    Raises:
        Rejected: It must not be added.
    """
    from hfedmoe_ray.trust.secure.messages import read_vector  # with cryptography, which is an extra
    from hfedmoe_ray.trust.secure.server import Sum

    metrics, request = result.metrics, result.task.secure
    assert request is not None and request.layout is not None
    if metrics is None or result.payload is None:
        raise Rejected("delivered no update")
    if not metrics.answers(result.task):
        raise Rejected(f"answers for client {metrics.client}, round {metrics.round}, {metrics.kind}")
    if metrics.samples <= 0:
        raise Rejected(f"claims {metrics.samples} training examples")
    _check_claims(metrics, result.task.plan, limits)
    blocks = request.layout.presence()
    most = most_masked_bytes(request.layout.shape, sum(block.size for block in blocks), len(blocks))
    _check_size("update", result.payload_bytes, most)
    payload = result.payload()
    _check_size("update", len(payload), most)
    try:
        masked, rest = read_vector(payload, len(blocks))
        Sum(request.session, blocks).check(result.task.client, masked)
        beside = unpack_update(rest, metrics)
    except ValueError as error:
        raise Rejected(f"cannot be read: {error}") from error
    if (beside.profile is not None) != profiled:
        raise Rejected("holds no routing profile" if profiled else "holds a routing profile, which nobody asked for")
    if beside.profile is not None:
        _check_profile(beside.profile, request.layout.shape, limits)
    return replace(beside, masked=tuple(masked), payload_bytes=len(payload))


def check_update(
    update: ClientUpdate, plan: ExpertPlan, weights: Weights, *, trains: bool, limits: Limits = UNLIMITED
) -> None:
    """Checks that an update holds assigned experts only, in the right shapes, and finite numbers.

    Args:
        update: The parsed update.
        plan: What the client was given to do.
        weights: The weights it started from.
        trains: Whether shared parameters belong into it.
        limits: The most that it can truthfully claim.

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
    _check_statistics(update, plan, weights, trains=trains)
    _check_profile(update.profile, (len(plan.roles), len(plan.roles[0])), limits)


def _check_statistics(update: ClientUpdate, plan: ExpertPlan, weights: Weights, *, trains: bool) -> None:
    """Checks what a client measured beside its routing: mean outputs, class prototypes, scales, signals."""
    present = set(plan.present)
    for key, (mean, _) in update.means.items():
        if key not in present:
            raise Rejected(f"sends the mean output of expert {expert_name(key)}, which it does not hold")
        if weights.means is None or mean.shape != weights.means[key].shape or not _within(mean, _LARGEST_OUTPUT):
            raise Rejected(f"the mean output of expert {expert_name(key)} has a wrong shape, is huge or is not finite")
    if update.prototypes is not None:
        sums, counts = update.prototypes.sums, update.prototypes.counts
        head_shapes = {value.shape for value in weights.shared.values() if value.ndim == 2}
        if sums.shape not in head_shapes or counts.shape != sums.shape[:1] or {sums.dtype, counts.dtype} != {_FP32}:
            raise Rejected("the class prototypes do not have the task head's shape and type")
        if not np.isfinite(sums).all() or not (np.isfinite(counts) & (counts >= 0)).all():
            raise Rejected("the class prototypes hold NaN, infinity or negative counts")
        # A class without examples has no features either.
        if counts.sum(dtype=np.float64) > update.samples or not (np.abs(sums.T) <= _LARGEST_OUTPUT * counts).all():
            raise Rejected(f"the class prototypes are of more than its {update.samples} examples, or are huge")
        if trains:
            raise Rejected("sends class prototypes, which only profiling measures")
    start = plan.scale or ()
    if len(update.scale) != len(start) or not all(
        abs(scale) <= _ABSURD * max(abs(before), 1.0) for scale, before in zip(update.scale, start, strict=False)
    ):
        raise Rejected(f"sends {len(update.scale)} output scales, or huge ones, where {len(start)} were to train")
    shape = (len(plan.roles), len(plan.roles[0]))
    for signal, value in update.signals.items():
        most = 1.0 if signal == "accuracy" else _LARGEST_SIGNAL
        if value.shape != shape or value.dtype != np.float64 or not _within(value, most, least=0.0):
            raise Rejected(
                f"its {signal} of each expert has a wrong shape or type, is negative, too large or no number"
            )


def _check_profile(profile: RoutingProfile | None, shape: tuple[int, int], limits: Limits) -> None:
    """Checks that a routing profile is one of so many tokens at most: averages weigh clients by it."""
    if profile is None:
        raise Rejected("holds no routing profile")
    if not 0 < profile.tokens <= limits.tokens:
        raise Rejected(f"the routing profile is of {profile.tokens} tokens, not of 1 to {limits.tokens:g}")
    most = dict.fromkeys(PROFILE_FIELDS, 1 + _ROUNDING) | {"routed": float(profile.tokens)}
    for name in PROFILE_FIELDS:
        value: Array = getattr(profile, name)
        if value.shape != shape or value.dtype != np.float64 or not np.isfinite(value).all():
            raise Rejected(f"the routing profile's {name} has a wrong shape or type, or is not finite")
        if limits.noised:
            if not _within(value, _LARGEST_OUTPUT):
                raise Rejected(
                    f"the routing profile's {name} is not within -{_LARGEST_OUTPUT:g} and {_LARGEST_OUTPUT:g}"
                )
        elif not _within(value, most[name], least=0.0):
            raise Rejected(f"the routing profile's {name} is not within 0 and {most[name]:g}")
    if not limits.noised and not _within(profile.usage.sum(axis=1) - 1.0, _ROUNDING):
        raise Rejected("the routing profile's usage of a layer does not sum to 1")


_FP32 = np.dtype(np.float32)


def _within(value: Array, most: float, *, least: float | None = None) -> bool:
    """Whether all numbers are from `least` (default: -`most`) to `most`, which NaN is not."""
    return bool(((value >= (-most if least is None else least)) & (value <= most)).all())


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
        NotAsTrained: If any of this does not hold.
    """
    assigned = {expert_name(key) for key in plan.trainable}
    if set(metrics.before) != assigned or set(metrics.after) != assigned:
        fact = "did not report a checksum for each of its trainable experts"
        raise NotAsTrained(fact, plan.trainable, fact)
    if set(metrics.rebuilt) != (set(metrics.trained) if lossy else set()):
        fact = "did not report a checksum for each expert as it is sent"
        raise NotAsTrained(fact, plan.trainable, fact)
    for name in sorted(assigned):
        key = expert_key(name)
        if fact := _mismatch(update, metrics, name, checksum(weights.experts[key]), lossy=lossy):
            raise NotAsTrained(fact, [key], fact.replace("an expert", f"expert {name}"))


def _mismatch(update: ClientUpdate, metrics: ClientMetrics, name: str, published: str, *, lossy: bool) -> str:
    """What the checksums of an expert show to be wrong with it; empty where they fit."""
    key, started, ended = expert_key(name), metrics.before[name], metrics.after[name]
    if started != published:
        return "started an expert from other weights than those published"
    if key not in update.experts:
        return "changed an expert without a step on it" if started != ended else ""
    if started == ended:
        return "took steps on an expert, unchanged"
    arrived = checksum(update.experts[key])
    if lossy:
        return "" if arrived == metrics.rebuilt[name] else "sent an expert other than it arrived"
    return "" if arrived == ended else "sent an expert other than it stood after training"
