"""The small half of a client's answer, as JSON that is read strictly: a wrong type is refused, not met later on.

What is returned can be added up, sorted and printed by whoever reads it: counts are exact in fp64, and numbers finite
and far from where sums overflow. Whether they are true is another question (`federation.validation`).
"""

import json
import math
from dataclasses import asdict, fields

from pydantic import TypeAdapter, ValidationError

from hfedmoe_ray.types import ClientMetrics
from hfedmoe_ray.wire.strict_json import parse_object

_METRICS = TypeAdapter(ClientMetrics)
_FIELDS = frozenset(field.name for field in fields(ClientMetrics))
_COUNTS = ("samples", "tokens", "correct", "examples")
_AMOUNTS = ("seconds", "step_seconds", "peak_mib")
MOST_BYTES = 2**24
"""Of metrics as JSON; those of 10 000 experts that all train are 1.4 MB."""
MOST_COUNTED = 2**53
_MOST = 1e9
"""Of seconds and MiB: thirty years, and a thousand times the memory of the largest machines."""
_MOST_LOSS = 1e30


def dump_metrics(metrics: ClientMetrics) -> bytes:
    """Returns metrics as JSON; a loss that is not finite becomes null."""
    values = asdict(metrics)
    values["loss"] = metrics.loss if math.isfinite(metrics.loss) else None
    return json.dumps(values).encode()


def parse_metrics(data: bytes) -> ClientMetrics:
    """Inverse of `dump_metrics`. Raises ValueError for anything else, and for what no client can have measured."""
    if len(data) > MOST_BYTES:
        raise ValueError(f"they are {len(data)} bytes, more than {MOST_BYTES}")
    values = parse_object(data)
    if not values.keys() <= _FIELDS:
        raise ValueError(f"not the fields of {ClientMetrics.__name__}")
    if "loss" in values and values["loss"] is None:
        values["loss"] = math.nan
    try:
        metrics = _METRICS.validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    _check(metrics)
    return metrics


def _check(metrics: ClientMetrics) -> None:
    counts = {name: getattr(metrics, name) for name in _COUNTS} | {"steps": max(metrics.trained.values(), default=0)}
    for name, count in counts.items():
        if not 0 <= count < MOST_COUNTED:
            raise ValueError(f"{name} is {count:.3g}" if abs(count) < _MOST_LOSS else f"{name} is beyond counting")
    if metrics.correct > metrics.examples:
        raise ValueError(f"more is correct than the {metrics.examples} examples")
    for name, amount in metrics.answered.items():
        if not 0 <= amount < MOST_COUNTED:
            raise ValueError(f"{name[:20]!r} of what was answered is {amount:.3g}")
    for name in _AMOUNTS:
        if not 0 <= getattr(metrics, name) <= _MOST:
            raise ValueError(f"{name} is {getattr(metrics, name):.3g}")
    if abs(metrics.loss) > _MOST_LOSS:  # which NaN is not
        raise ValueError(f"loss is {metrics.loss:.3g}")
