"""The most that a client can truthfully say and send for one task, as far as the server knows.

Sizes follow from the plan, the published weights and the codec, before a byte is read. Counts follow from what the
client was told to do: a client that could claim any number of examples or tokens would own every average that they
weigh. How many examples it has is known where the server dealt them, and else what `clients.most_examples` says.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import inf

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.config.wire import Wire
from hfedmoe_ray.types import Array, ClientTask, ExpertPlan, Signal, Weights
from hfedmoe_ray.wire import PROFILE_FIELDS, build_codec, expert_name

_HEADER_ENTRY = 160
"""Bytes that the header of a payload spends on a tensor at most, its name aside."""
_NUMBER, _MEASURE = 4, 8
"""Bytes of a number in weights and mean outputs, and in what is measured of each expert."""
_PARTS = 2
"""Arrays that a codec makes of one, at most."""
_PASSES = 2
"""Times a batch passes through the model in a step, at most: once to choose its experts, once to train them."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may claim; without a limit where nothing is known."""

    samples: float = inf
    """Training examples."""
    steps: float = inf
    """Optimizer steps on an expert."""
    tokens: float = inf
    """Tokens that passed through the model."""
    noised: bool = False
    """Whether its routing profile is what `privacy.selection` makes of it, which adds up to nothing."""


UNLIMITED = Limits()


def claims(experiment: Experiment, task: ClientTask, dealt: int) -> Limits:
    """What the client of a task may claim.

    Args:
        experiment: The run.
        task: What it was to do.
        dealt: Training examples that the server dealt it; 0 where it reads its own.
    """
    local = experiment.local
    examples = local.profile_examples if task.kind == "profile" else _PASSES * local.steps * local.batch_size
    read_and_written = 2 if experiment.model.task == "seq2seq" else 1
    privacy = experiment.privacy
    return Limits(
        samples=dealt or experiment.clients.most_examples or inf,
        steps=local.steps,
        # Batches that are drawn for `privacy.examples` are of any size.
        tokens=inf if privacy.examples is not None else examples * read_and_written * experiment.data.max_length,
        noised=privacy.selection is not None and task.kind == "profile",
    )


def most_payload_bytes(
    plan: ExpertPlan, weights: Weights, wire: Wire, signals: Collection[Signal], *, trains: bool
) -> int:
    """The most that the payload of an update can weigh.

    Args:
        plan: What the client was given to do.
        weights: The weights it started from.
        wire: How updates travel in this run.
        signals: What it was asked to measure of each expert.
        trains: Whether it trained, or only looked at its data.
    """
    codec = build_codec(wire)
    arrays: list[tuple[str, Array]] = []
    if trains:
        arrays += [(f"shared.{name}", array) for name, array in weights.shared.items()]
        for key in plan.trainable:
            arrays += [(f"expert.{expert_name(key)}.{name}", array) for name, array in weights.experts[key].items()]
    trained = sum(array.nbytes if codec is None else codec.most_bytes(array.shape) for _, array in arrays)
    header = sum(_PARTS * (len(name.encode()) + _HEADER_ENTRY) for name, _ in arrays)
    grids = len(PROFILE_FIELDS) + len(signals)
    experts = len(plan.roles) * len(plan.roles[0])
    hidden = 0 if weights.means is None else weights.means.shape[-1]
    means = len(plan.present) * (hidden * _NUMBER + _HEADER_ENTRY)
    # Class prototypes: as many numbers as a task head and its bias.
    head = max((array.size + len(array) for array in weights.shared.values() if array.ndim == 2), default=0) * _NUMBER
    return trained + header + means + head + grids * (experts * _MEASURE + _HEADER_ENTRY) + 4 * _HEADER_ENTRY


def most_masked_bytes(shape: tuple[int, int], numbers: int, blocks: int) -> int:
    """The most that a masked vector can weigh, with a routing profile beside it.

    Args:
        shape: (L, E).
        numbers: Of the vector.
        blocks: That it is sent in.
    """
    profile = (len(PROFILE_FIELDS) + 1) * (shape[0] * shape[1] * _MEASURE + _HEADER_ENTRY)
    return numbers * _MEASURE + blocks * _HEADER_ENTRY + profile


def most_state_bytes(weights: Weights, wire: Wire) -> int:
    """The most that a client can have to keep for itself: what is owed of every tensor it may ever have sent."""
    if not wire.feeds_back:
        return 0
    return _kept(weights.shared) + sum(_kept(tensors) for tensors in weights.experts.values()) + _HEADER_ENTRY


def _kept(tensors: Mapping[str, Array]) -> int:
    return sum(array.size * _NUMBER + len(name.encode()) + _HEADER_ENTRY for name, array in tensors.items())
