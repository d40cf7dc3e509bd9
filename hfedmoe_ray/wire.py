"""What travels back from a client: safetensors bytes for arrays, JSON for numbers. Nothing else is ever parsed.

Names: `expert.<layer>.<expert>.<tensor>`, `shared.<parameter>`, `mean.<layer>.<expert>`, `profile.<field>`,
`prototype.<field>`.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from hfedmoe_ray.types import Array, ClientMetrics, ClientUpdate, ExpertKey, Prototypes, RoutingProfile

PROFILE_FIELDS = ("usage", "specific", "kl", "routed")


def expert_name(key: ExpertKey) -> str:
    """Returns `layer.expert`, as experts are named in JSON."""
    return f"{key.layer}.{key.expert}"


def expert_key(name: str) -> ExpertKey:
    """Inverse of `expert_name`. Raises ValueError for anything else."""
    layer, expert = name.split(".")
    return ExpertKey(int(layer), int(expert))


def checksum(tensors: Mapping[str, Array]) -> str:
    """Returns a 16-byte BLAKE2b hex digest over names and bytes, independent of the mapping's order."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name]).tobytes())
    return digest.hexdigest()


def pack_update(
    experts: Mapping[ExpertKey, Mapping[str, Array]],
    shared: Mapping[str, Array],
    profile: RoutingProfile | None,
    means: Mapping[ExpertKey, Array],
    prototypes: Prototypes | None = None,
) -> bytes:
    """Returns the payload of an update. The tokens behind a mean output are the profile's `routed`."""
    tensors: dict[str, Array] = {f"shared.{name}": value for name, value in shared.items()}
    for key, named in experts.items():
        tensors |= {f"expert.{expert_name(key)}.{name}": value for name, value in named.items()}
    tensors |= {f"mean.{expert_name(key)}": mean for key, mean in means.items()}
    if prototypes is not None:
        tensors |= {"prototype.sums": prototypes.sums, "prototype.counts": prototypes.counts}
    if profile is not None:
        tensors |= {f"profile.{name}": getattr(profile, name) for name in PROFILE_FIELDS}
        tensors["profile.tokens"] = np.array([profile.tokens], dtype=np.int64)
    return save({name: np.ascontiguousarray(value) for name, value in tensors.items()})


def unpack_update(payload: bytes, metrics: ClientMetrics) -> ClientUpdate:
    """Parses a payload.

    Raises:
        ValueError: For bytes that are not such a payload; the message says what is wrong. Whether the update is
            *acceptable* is another question (`federation.validation`).
    """
    try:
        tensors = load(payload)
    except (SafetensorError, KeyError, ValueError) as error:  # KeyError: a type that NumPy does not have
        raise ValueError(f"not a safetensors payload: {error}") from error
    experts: dict[ExpertKey, dict[str, Array]] = {}
    shared: dict[str, Array] = {}
    means: dict[ExpertKey, Array] = {}
    profile: dict[str, Array] = {}
    prototypes: dict[str, Array] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        match kind:
            case "shared":
                shared[rest] = value
            case "expert":
                layer, expert, tensor = rest.split(".", 2)
                experts.setdefault(ExpertKey(int(layer), int(expert)), {})[tensor] = value
            case "mean":
                means[expert_key(rest)] = value
            case "profile":
                profile[rest] = value
            case "prototype" if rest in ("sums", "counts"):
                prototypes[rest] = value
            case _:
                raise ValueError(f"unknown entry {name!r}")
    parsed = _profile(profile)
    return ClientUpdate(
        client=metrics.client,
        samples=metrics.samples,
        experts=experts,
        shared=shared,
        trained={expert_key(name): steps for name, steps in metrics.trained.items()},
        profile=parsed,
        means={key: (mean, int(parsed.routed[key]) if parsed else 0) for key, mean in means.items()},
        prototypes=Prototypes(**prototypes) if len(prototypes) == 2 else None,
        payload_bytes=len(payload),
    )


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


def dump_metrics(metrics: ClientMetrics) -> bytes:
    """Returns metrics as JSON; a loss that is not finite becomes null."""
    fields = asdict(metrics)
    fields["loss"] = metrics.loss if math.isfinite(metrics.loss) else None
    return json.dumps(fields).encode()


def parse_metrics(data: bytes) -> ClientMetrics:
    """Inverse of `dump_metrics`. Raises ValueError or TypeError for anything else."""
    fields: dict[str, Any] = json.loads(data)
    if fields["loss"] is None:
        fields["loss"] = math.nan
    return ClientMetrics(**fields)
