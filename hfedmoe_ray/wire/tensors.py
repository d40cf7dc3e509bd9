"""Safetensors bytes to arrays, read more strictly than the library reads them.

Of two entries of one name the library keeps one, and it ignores fields it does not know. Here nobody shall see another
update in the same bytes than this server does, so that the header must say everything once, and nothing else.
"""

from safetensors import SafetensorError
from safetensors.numpy import load

from hfedmoe_ray.types import Array
from hfedmoe_ray.wire.strict_json import parse_object

_FIELDS = {"dtype", "shape", "data_offsets"}
_TYPES = frozenset({"F64", "F32", "F16", "I64", "U32", "U16", "I8"})
"""Of weights, of what codecs write and of what clients measure."""
MASKED = frozenset({"U8", "U32", "U64", "F64", "I64"})
"""Of what secure aggregation sends: keys and shares, masked numbers, a routing profile beside them."""
_LENGTH = 8
"""Bytes at the start that hold the header's length."""


def read_tensors(payload: bytes, types: frozenset[str] = _TYPES) -> dict[str, Array]:
    """Returns the tensors of safetensors bytes.

    Args:
        payload: The bytes.
        types: What may be in them. Default: what `wire.payload` writes.

    Raises:
        ValueError: They are none, their header says anything twice or beside the tensors, or a type is not of `types`.
    """
    try:
        _check_header(payload, types)
        return load(payload)
    except (SafetensorError, KeyError, ValueError, OverflowError, MemoryError) as error:
        raise ValueError(f"not a safetensors payload: {error}") from error


def _check_header(payload: bytes, types: frozenset[str]) -> None:
    length = int.from_bytes(payload[:_LENGTH], "little")
    if len(payload) < _LENGTH + length or not length:
        raise ValueError(f"{len(payload)} bytes cannot hold a header of {length}")
    for name, entry in parse_object(payload[_LENGTH : _LENGTH + length]).items():
        if not isinstance(entry, dict) or entry.keys() != _FIELDS:
            raise ValueError(f"the header says more or less of {name[:80]!r} than type, shape and place")
        if str(entry["dtype"]) not in types:
            raise ValueError(f"{name[:80]!r} is of type {str(entry['dtype'])[:20]}")
