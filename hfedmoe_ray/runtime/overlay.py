"""Which arrays a task reads: the experts its plan names, a client's private ones in place of the global ones.

Shared by both executors, so that they cannot come to differ. Free of Ray.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from hfedmoe_ray.types import Array, ExpertKey

Expert = TypeVar("Expert")


def overlay(
    present: Iterable[ExpertKey], common: Mapping[ExpertKey, Expert], own: Mapping[ExpertKey, Expert]
) -> dict[ExpertKey, Expert]:
    """The present experts: `own` where the client has a private one, else `common`."""
    return {key: own[key] if key in own else common[key] for key in present}


def read_only(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Views of the arrays that refuse to be written."""
    return {name: view(array) for name, array in arrays.items()}


def view(array: Array) -> Array:
    """A view of one array that refuses to be written."""
    result = array.view()
    result.flags.writeable = False
    return result
