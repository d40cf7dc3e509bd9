"""The payload of an update: safetensors bytes. Nothing else that a client sends as bytes is ever parsed.

Names: `expert.<layer>.<expert>.<tensor>`, `shared.<parameter>`, `mean.<layer>.<expert>`, `profile.<field>`,
`prototype.<field>`, `signal.<name>`. Where a codec wrote a tensor (`wire.codecs`) its name is followed by `:<part>`.
"""

from collections.abc import Mapping
from typing import get_args

import numpy as np
from safetensors.numpy import save

from hfedmoe_ray.types import Array, ClientMetrics, ClientUpdate, ExpertKey, Prototypes, RoutingProfile, Signal
from hfedmoe_ray.wire.codecs import from_bf16, to_bf16
from hfedmoe_ray.wire.names import expert_key, expert_name
from hfedmoe_ray.wire.tensors import read_tensors

PROFILE_FIELDS = ("usage", "specific", "kl", "routed")
SIGNALS: tuple[Signal, ...] = get_args(Signal)


def pack_update(
    experts: Mapping[ExpertKey, Mapping[str, Array]],
    shared: Mapping[str, Array],
    profile: RoutingProfile | None,
    means: Mapping[ExpertKey, Array],
    prototypes: Prototypes | None = None,
    *,
    signals: Mapping[Signal, Array] | None = None,
    lossy: bool = False,
) -> bytes:
    """Returns the payload of an update.

    Args:
        experts: Tensors of each trained expert, or the parts a codec made of them.
        shared: The same of shared parameters.
        profile: How the client's tokens used the experts.
        means: Mean output [H] of held experts; the tokens behind each are the profile's `routed`.
        prototypes: Where the classes lie, if asked for.
        signals: What was measured of each expert, [L, E], if asked for.
        lossy: Write the mean outputs in bfloat16: they stand in for experts to a few percent, not to 24 bits.
    """
    tensors: dict[str, Array] = {f"shared.{name}": value for name, value in shared.items()}
    for key, named in experts.items():
        tensors |= {f"expert.{expert_name(key)}.{name}": value for name, value in named.items()}
    tensors |= {f"mean.{expert_name(key)}": to_bf16(mean) if lossy else mean for key, mean in means.items()}
    if prototypes is not None:
        tensors |= {"prototype.sums": prototypes.sums, "prototype.counts": prototypes.counts}
    tensors |= {f"signal.{name}": value for name, value in (signals or {}).items()}
    if profile is not None:
        tensors |= {f"profile.{name}": getattr(profile, name) for name in PROFILE_FIELDS}
        tensors["profile.tokens"] = np.array([profile.tokens], dtype=np.int64)
    return save({name: np.ascontiguousarray(value) for name, value in tensors.items()})


def unpack_update(payload: bytes, metrics: ClientMetrics, *, lossy: bool = False) -> ClientUpdate:
    """Parses a payload; what a codec wrote stays as its parts.

    Args:
        payload: What the client sent.
        metrics: What it said of it.
        lossy: Whether mean outputs are in bfloat16.

    Raises:
        ValueError: For bytes that are not such a payload; the message says what is wrong. Whether the update is
            *acceptable* is another question (`federation.validation`).
    """
    experts: dict[ExpertKey, dict[str, Array]] = {}
    shared: dict[str, Array] = {}
    means: dict[ExpertKey, Array] = {}
    profile: dict[str, Array] = {}
    prototypes: dict[str, Array] = {}
    signals: dict[Signal, Array] = {}
    for name, value in read_tensors(payload).items():
        kind, _, rest = name.partition(".")
        match kind:
            case "shared":
                shared[rest] = value
            case "expert":
                layer, expert, tensor = rest.split(".", 2)
                experts.setdefault(expert_key(f"{layer}.{expert}"), {})[tensor] = value
            case "mean":
                if value.dtype != (np.uint16 if lossy else np.float32):
                    raise ValueError(f"the mean output of expert {rest[:20]} is {value.dtype}")
                means[expert_key(rest)] = from_bf16(value) if lossy else value
            case "profile":
                profile[rest] = value
            case "signal" if rest in SIGNALS:
                signals[rest] = value
            case "prototype" if rest in ("sums", "counts"):
                prototypes[rest] = value
            case _:
                raise ValueError(f"unknown entry {name!r}")
    if len(prototypes) == 1:
        raise ValueError("there are sums or counts of class prototypes, but not both")
    parsed = _profile(profile)
    return ClientUpdate(
        client=metrics.client,
        samples=metrics.samples,
        experts=experts,
        shared=shared,
        trained={expert_key(name): steps for name, steps in metrics.trained.items()},
        profile=parsed,
        means={key: (mean, _tokens_behind(key, parsed)) for key, mean in means.items()},
        prototypes=Prototypes(**prototypes) if prototypes else None,
        signals=signals,
        scale=metrics.scale,
        payload_bytes=len(payload),
    )


def _tokens_behind(key: ExpertKey, profile: RoutingProfile | None) -> int:
    """Tokens over which the mean output of an expert was taken."""
    if profile is None:
        return 0
    routed = profile.routed
    if routed.ndim != 2 or not (0 <= key.layer < routed.shape[0] and 0 <= key.expert < routed.shape[1]):
        raise ValueError(f"there is no expert {expert_name(key)} in the routing profile")
    tokens = float(routed[key])
    if not 0 <= tokens < 2**53:
        raise ValueError(f"the routing profile says that {tokens:g} tokens were routed to expert {expert_name(key)}")
    return int(tokens)


def _profile(fields: Mapping[str, Array]) -> RoutingProfile | None:
    if not fields:
        return None
    expected = {*PROFILE_FIELDS, "tokens"}
    if set(fields) != expected:
        raise ValueError(f"the routing profile has {sorted(fields)}, not {sorted(expected)}")
    tokens = fields["tokens"]
    if tokens.shape != (1,) or tokens.dtype != np.int64:
        raise ValueError("the routing profile's token count is not one integer")
    return RoutingProfile(**{name: fields[name] for name in PROFILE_FIELDS}, tokens=int(tokens[0]))
