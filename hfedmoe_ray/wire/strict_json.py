"""JSON from elsewhere: one object in which every key stands once and every number is one."""

import json
import math
from collections.abc import Sequence
from typing import Any, NoReturn


def parse_object(data: bytes) -> dict[str, Any]:
    """Returns a JSON object.

    Raises:
        ValueError: For anything else: other bytes than UTF-8, a key that stands twice, NaN, a number beyond fp64, or
            nesting so deep that the parser gives up.
    """
    try:
        values = json.loads(
            data.decode(), object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite_number
        )
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError(f"it is not an object but {type(values).__name__}")
    return values


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key stands in it twice")
    return values


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _finite_number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number in it is too large")
    return value
