"""Keeping a page bounded: a long run is drawn from some of its points, or from means over neighbouring rounds."""

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def thinned(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many items, evenly spaced; the first and the last are among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def spans(count: int, most: int) -> list[range]:
    """Cuts 0..`count` into at most so many runs of neighbours, of the same length but for the last."""
    length = max(1, -(-count // most))
    return [range(first, min(first + length, count)) for first in range(0, count, length)]


def span_name(numbers: Sequence[int]) -> str:
    """How a run of neighbouring rounds is called: "7", "7–9"."""
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}–{numbers[-1]}"
