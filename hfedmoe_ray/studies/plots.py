"""The charts of studies, drawn with the marks of `tracking.svg`: curves over any axis, and estimates with intervals."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hfedmoe_ray.tracking.charts import Write
from hfedmoe_ray.tracking.svg import LETTER, circle, colour, image, line, polyline, rect, text, ticks

_WIDE = 440.0
"""Natural width, as of the charts of a report."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line: (x, y) in the order of x, and where each y may lie."""

    name: str
    points: Sequence[tuple[float, float]]
    spread: Sequence[tuple[float, float]] = ()
    """(low, high) of every point; empty where there is none."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One row: a mean, its interval, and the values behind it."""

    name: str
    mean: float
    low: float
    high: float
    values: Sequence[float] = ()
    group: int = 0
    """Its colour."""


def curves(
    lines: Sequence[Curve], *, label: str, across: str, write: Write, write_x: Write, doubling: bool = False
) -> str:
    """Lines over any quantity, each ending in its last value; later ones are dashed, as in `charts.legend`.

    Args:
        lines: At least one, of at least one point.
        label: The text alternative.
        across: What the x axis is.
        write: Writes a value.
        write_x: Writes an x.
        doubling: Whether equal steps of the x axis are doublings. Its marks are then the points themselves.
    """
    height, left, top, bottom = 270.0, 50.0, 12.0, 226.0
    right = _WIDE - 14 - 1.2 * LETTER * max(len(write(one.points[-1][1])) for one in lines)
    every_x = sorted({x for one in lines for x, _ in one.points})
    values = [y for one in lines for _, y in one.points]
    low, high = _reach(values, [y for one in lines for ends in one.spread for y in ends])
    marks = ticks(0.0 if 0 <= low < 0.4 * high else low, high)
    marks_x = every_x if doubling else ticks(every_x[0], every_x[-1])
    first, last = (math.log2(x) if doubling else x for x in (marks_x[0], marks_x[-1]))

    def place(x: float) -> float:
        at = math.log2(x) if doubling else x
        return left + (right - left) * ((at - first) / (last - first) if last > first else 0.5)

    def up(y: float) -> float:
        return bottom - (bottom - top) * (y - marks[0]) / (marks[-1] - marks[0])

    parts = [line(left, up(mark), right, up(mark), "grid" if index else "axis") for index, mark in enumerate(marks)]
    parts += [text(left - 7, up(mark) + 3.5, write(mark), anchor="end") for mark in marks]
    needed = LETTER * max(len(write_x(x)) for x in marks_x) + 6
    shown, end = [], -math.inf
    for x in marks_x:
        if place(x) - end >= needed:
            shown.append(x)
            end = place(x)
    parts += [text(place(x), bottom + 17, write_x(x)) for x in shown]
    parts.append(text((left + right) / 2, height - 3, across, "name"))
    for index, one in enumerate(lines):
        for (x, _), ends in zip(one.points, one.spread, strict=False):
            least, most = (min(max(end, marks[0]), marks[-1]) for end in ends)
            parts.append(line(place(x), up(least), place(x), up(most), f"line {colour(index)} interval"))
        kind = f"line {colour(index)} dashed" if index else f"line {colour(index)}"
        parts.append(polyline(((place(x), up(y)) for x, y in one.points), kind))
        for x, y in one.points:
            tip = f"{one.name}, {across} {write_x(x)}: {write(y)}"
            parts.append(circle(place(x), up(y), 2.8, kind=f"dot {colour(index)}", tip=tip))
    floor = -math.inf
    for y, index in sorted((up(one.points[-1][1]), index) for index, one in enumerate(lines)):
        floor = max(y, floor + 14)  # Two lines that end together would write over each other.
        x, value = lines[index].points[-1]
        parts.append(text(place(x) + 8, floor + 4, write(value), f"end {colour(index)}", "start"))
    return image(_WIDE, height, label, *parts)


def estimates(rows: Sequence[Estimate], *, label: str, write: Write, reference: float | None = None) -> str:
    """A row per estimate: a dot at the mean, a line over the interval (cut at the edges), a small mark per value.

    `reference`, such as the mean of what is varied, is a dashed line through all rows.
    """
    left = 14 + 1.1 * LETTER * max(len(row.name) for row in rows)
    right = max(left + 120, _WIDE - 14 - 1.4 * LETTER * max(len(write(row.mean)) for row in rows))
    values = [value for row in rows for value in (row.mean, *row.values)] + [reference or rows[0].mean]
    marks = ticks(*_reach(values, [end for row in rows for end in (row.low, row.high)]))
    tall, top = 26.0, 6.0
    bottom = top + tall * len(rows)

    def place(value: float) -> float:
        return left + (right - left) * (value - marks[0]) / (marks[-1] - marks[0])

    parts = [line(place(mark), top, place(mark), bottom) for mark in marks]
    widest = max(len(write(mark)) for mark in marks) * LETTER + 8
    stride = next(n for n in (1, 2, 3, 4, 8) if n * (place(marks[1]) - place(marks[0])) >= widest or n == 8)
    parts += [text(place(mark), bottom + 15, write(mark)) for mark in marks[::stride]]
    if reference is not None:
        parts.append(line(place(reference), top, place(reference), bottom, "even"))
    for index, row in enumerate(rows):
        y = top + (index + 0.5) * tall
        tip = f"{row.name}: {write(row.mean)}, {write(row.low)} to {write(row.high)}"
        parts.append(text(left - 8, y + 4, row.name, "row", "end"))
        low, high = (min(max(end, marks[0]), marks[-1]) for end in (row.low, row.high))
        parts.append(line(place(low), y, place(high), y, f"line {colour(row.group)}"))
        parts += [line(place(v), y - 5, place(v), y + 5, f"line {colour(row.group)} thin") for v in row.values]
        parts.append(circle(place(row.mean), y, 4.2, kind=f"bubble {colour(row.group)}", tip=tip))
        parts.append(text(right + 8, y + 4, write(row.mean), f"end {colour(row.group)}", "start"))
    return image(max(_WIDE, right + 60), bottom + 20, label, *parts)


def _reach(values: Sequence[float], ends: Sequence[float]) -> tuple[float, float]:
    """What an axis covers: all values, and of intervals as much as half of the values' range beyond them.

    Two seeds give intervals many times as wide as anything measured; drawn whole they would hide the values.
    """
    low, high = min(values), max(values)
    room = (high - low or abs(high) or 1.0) / 2
    least = max(min([low, *ends]), low - room)
    # Nor does an axis go below zero for what cannot.
    return max(least, 0.0) if low >= 0 else least, min(max([high, *ends]), high + room)


def scatter(
    groups: Mapping[str, Sequence[tuple[float, float]]],
    *,
    label: str,
    across: str,
    upward: str,
    write: Write,
) -> str:
    """A point for each (x, y), coloured by group, on two equal axes; dashed is where both are the same."""
    side, left, top = 300.0, 56.0, 10.0
    values = [value for points in groups.values() for point in points for value in point]
    marks = ticks(min(values), max(values))
    bottom, right = top + side, left + side

    def share(value: float) -> float:
        return side * (value - marks[0]) / (marks[-1] - marks[0])

    parts = [line(left, bottom - share(mark), right, bottom - share(mark)) for mark in marks]
    parts += [line(left + share(mark), top, left + share(mark), bottom) for mark in marks]
    parts += [text(left - 7, bottom - share(mark) + 3.5, write(mark), anchor="end") for mark in marks]
    stride = 1 if len(marks) * LETTER * (max(len(write(mark)) for mark in marks) + 1) <= side else 2
    parts += [text(left + share(mark), bottom + 16, write(mark)) for mark in marks[::stride]]
    parts.append(line(left, bottom, right, top, "even"))
    for group, (name, points) in enumerate(groups.items()):
        for x, y in points:
            tip = f"{name}: {write(x)} {across}, {write(y)} {upward}"
            parts.append(circle(left + share(x), bottom - share(y), 4.0, kind=f"bubble {colour(group)}", tip=tip))
    parts.append(text(left + side / 2, bottom + 33, across, "name"))
    parts.append(text(left + 6, top + 12, upward, "name", "start"))
    return image(right + 22, bottom + 38, label, *parts)


def grouped_bars(rows: Mapping[str, Mapping[str, float]], *, label: str, write: Write) -> str:
    """Bars from zero, a group per row and a colour per name within it; all rows have the same names."""
    left = 14 + 1.1 * LETTER * max(map(len, rows))
    values = [value for row in rows.values() for value in row.values()]
    length = _WIDE - left - 14 - LETTER * max(len(write(value)) for value in values)
    peak, thick, y = max(values) or 1.0, 14.0, 4.0
    parts = []
    for name, row in rows.items():
        parts.append(text(left - 8, y + thick * len(row) / 2 + 3, name, "row", "end"))
        for group, (kind, value) in enumerate(row.items()):
            reach, tip = max(1.0, length * value / peak), f"{name}, {kind}: {write(value)}"
            parts.append(rect(left, y, reach, thick - 2, kind=f"fill {colour(group)}", tip=tip))
            parts.append(text(left + reach + 6, y + 10, write(value), anchor="start"))
            y += thick
        y += 10.0
    return image(_WIDE, y, label, *parts)
