"""From trained tensors to what is sent, and from what arrives to what is averaged.

With fp32 the tensors themselves travel. A codec loses something, so it is given what changed: the client sends
encode(trained - published + residual), and the server continues with published + decode(...). Both sides compute that
sum by `_rebuild`, so the client knows to the last bit what the server will have, and can prove it (the canary).

Error feedback (Seide et al. 2014; Karimireddy et al. 2019): the residual is what the codec has lost so far. The client
keeps it and adds it to what it sends next, so that a change too small to be sent is only late, never lost. It is kept
for each expert and shared parameter until the client trains it again, and so is at most as large as all the client
ever trained. It is the client's own state: on a real device it never leaves it and is not counted as traffic.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from hfedmoe_ray.config.wire import Wire
from hfedmoe_ray.types import (
    Array,
    ClientMetrics,
    ClientUpdate,
    ExpertKey,
    RoutingProfile,
    Signal,
    TaskWeights,
    Weights,
)
from hfedmoe_ray.wire.codecs import Codec, build_codec
from hfedmoe_ray.wire.names import checksum, expert_key, expert_name
from hfedmoe_ray.wire.payload import pack_update, unpack_update
from hfedmoe_ray.wire.tensors import read_tensors

Tensors = Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What a client leaves of a training task."""

    payload: bytes
    """Goes to the server."""
    rebuilt: Mapping[str, str] = field(default_factory=dict)
    """"layer.expert" -> checksum of what the server will make of the payload; empty with fp32."""
    state: bytes = b""
    """Stays with the client: the residuals of error feedback. Empty where there is none to keep."""


def make_upload(
    wire: Wire,
    start: TaskWeights,
    experts: Mapping[ExpertKey, Tensors],
    shared: Tensors,
    *,
    profile: RoutingProfile,
    means: Mapping[ExpertKey, Array],
    signals: Mapping[Signal, Array] | None = None,
) -> Upload:
    """Writes what was trained as the configuration says.

    Args:
        wire: Precision and error feedback.
        start: The published weights the task started from, and the client's state.
        experts: New tensors of each expert that took a step.
        shared: New routers and shared parameters.
        profile: The routing profile.
        means: Mean output [H] of held experts.
        signals: What the strategy asked to be measured of each expert, [L, E], if anything.

    Raises:
        ValueError: The client's state does not belong to these tensors.
    """
    codec = build_codec(wire)
    if codec is None:
        return Upload(payload=pack_update(experts, shared, profile, means, signals=signals))
    residual = _read_state(start.state) if wire.feeds_back else {}
    parts: dict[ExpertKey, Tensors] = {}
    rebuilt: dict[str, str] = {}
    for key, tensors in experts.items():
        sent = _compress(codec, start.experts[key], tensors, residual.get(key, {}))
        parts[key], residual[key], rebuilt[expert_name(key)] = sent.parts, sent.residual, checksum(sent.rebuilt)
    sent = _compress(codec, start.shared, shared, residual.get(None, {}))
    residual[None] = sent.residual
    return Upload(
        payload=pack_update(parts, sent.parts, profile, means, signals=signals, lossy=True),
        rebuilt=rebuilt,
        state=_write_state(residual) if wire.feeds_back else b"",
    )


def read_upload(payload: bytes, metrics: ClientMetrics, wire: Wire, published: Weights) -> ClientUpdate:
    """Parses a payload and puts the published weights under what was sent as a change.

    Args:
        payload: What the client sent.
        metrics: What it said of it.
        wire: The run's precision.
        published: The weights its task started from.

    Raises:
        ValueError: It is not such a payload; the message says what is wrong.
    """
    update = unpack_update(payload, metrics, lossy=wire.lossy)
    codec = build_codec(wire)
    if codec is None:
        return update
    experts = {}
    for key, parts in update.experts.items():
        if key not in published.experts:
            raise ValueError(f"there is no expert {expert_name(key)}")
        # A few bytes can stand for a whole expert: none is written out that nobody was asked for.
        if key not in update.trained:
            raise ValueError(f"it holds expert {expert_name(key)}, which it does not say it trained")
        experts[key] = _decompress(codec, published.experts[key], parts, f"expert {expert_name(key)}")
    shared = _decompress(codec, published.shared, update.shared, "shared parameters")
    return replace(update, experts=experts, shared=shared)


# ------------------------------------------------------------------------------------------------ tensors and parts


@dataclass(frozen=True)
class _Compressed:
    parts: dict[str, Array]
    """As they travel: tensor:part -> array."""
    rebuilt: dict[str, Array]
    """As the server will have them."""
    residual: dict[str, Array]
    """Change that has not been sent yet, fp32."""


def _compress(codec: Codec, start: Tensors, trained: Tensors, residual: Tensors) -> _Compressed:
    """Encodes the change of every tensor and what is still owed of it."""
    result = _Compressed({}, {}, {})
    for name, value in trained.items():
        change = np.subtract(value, start[name], dtype=np.float32)
        if name in residual:
            if residual[name].shape != change.shape:
                raise ValueError(
                    f"the client's state holds {list(residual[name].shape)} numbers for {name}, "
                    f"which is {list(change.shape)}"
                )
            change = change + residual[name]
        parts = codec.encode(change)
        # A diverged tensor goes on its way, for the server to reject it and to drop the state.
        received = codec.decode(parts, change.shape) if np.isfinite(change).all() else np.zeros_like(change)
        result.parts.update({f"{name}:{part}": array for part, array in parts.items()})
        result.rebuilt[name] = _rebuild(start[name], received)
        result.residual[name] = change - received
    return result


def _decompress(codec: Codec, published: Tensors, parts: Tensors, what: str) -> dict[str, Array]:
    """Inverse of `_compress` on the server's side; does not look for tensors that are missing altogether."""
    tensors: dict[str, dict[str, Array]] = {}
    for name, array in parts.items():
        tensor, _, part = name.rpartition(":")
        tensors.setdefault(tensor, {})[part] = array
    rebuilt = {}
    for name, named in tensors.items():
        if name not in published:
            raise ValueError(f"{what}: there is no tensor {name!r}")
        try:
            change = codec.decode(named, published[name].shape)
        except ValueError as error:
            raise ValueError(f"{what}: {name}: {error}") from error
        rebuilt[name] = _rebuild(published[name], change)
    return rebuilt


def _rebuild(published: Array, change: Array) -> Array:
    """What client and server alike take the trained tensor to be."""
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is rejected as such
        total = np.add(published, change, dtype=np.float32)
    return np.asarray(total, dtype=published.dtype)


# ---------------------------------------------------------------------------------------------------- client state


def _write_state(residual: Mapping[ExpertKey | None, Tensors]) -> bytes:
    """Residuals of experts, and of shared parameters under None, as safetensors."""
    experts = {key: tensors for key, tensors in residual.items() if key is not None}
    return pack_update(experts, residual.get(None, {}), None, {})


def _read_state(state: bytes) -> dict[ExpertKey | None, Tensors]:
    """Inverse of `_write_state`; nothing for a client without a state."""
    residual: dict[ExpertKey | None, dict[str, Array]] = {}
    for name, value in (read_tensors(state) if state else {}).items():
        match name.split("."):
            case ["shared", *rest]:
                residual.setdefault(None, {})[".".join(rest)] = value
            case ["expert", layer, expert, *rest]:
                residual.setdefault(expert_key(f"{layer}.{expert}"), {})[".".join(rest)] = value
    return dict(residual)
