"""The small half of a client's answer, as JSON that is read strictly: a wrong type is refused, not met later on."""

import json
import math
from dataclasses import asdict, fields

from pydantic import TypeAdapter

from hfedmoe_ray.types import ClientMetrics

_METRICS = TypeAdapter(ClientMetrics)
_FIELDS = frozenset(field.name for field in fields(ClientMetrics))


def dump_metrics(metrics: ClientMetrics) -> bytes:
    """Returns metrics as JSON; a loss that is not finite becomes null."""
    values = asdict(metrics)
    values["loss"] = metrics.loss if math.isfinite(metrics.loss) else None
    return json.dumps(values).encode()


def parse_metrics(data: bytes) -> ClientMetrics:
    """Inverse of `dump_metrics`. Raises ValueError for anything else."""
    values = json.loads(data)
    if not isinstance(values, dict) or not values.keys() <= _FIELDS:
        raise ValueError(f"not the fields of {ClientMetrics.__name__}")
    if "loss" in values and values["loss"] is None:
        values["loss"] = math.nan
    return _METRICS.validate_json(json.dumps(values), strict=True)
