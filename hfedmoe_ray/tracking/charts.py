"""The charts of a report, drawn with the marks of `svg`.

A chart is drawn for the width of a phone, may grow by a quarter, and scrolls rather than shrink below legibility.
Every mark carries its value as a tooltip, every chart a text alternative.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from hfedmoe_ray.tracking.svg import (
    LETTER,
    STEPS,
    circle,
    colour,
    every,
    image,
    line,
    polyline,
    rect,
    text,
    ticks,
)
from hfedmoe_ray.tracking.thinning import thinned

Write = Callable[[float], str]
"""How a value is written."""
_WIDE = 390.0
"""Natural width of a chart that stands beside another on a desk and fills a phone."""
_MOST_DOTS, _MOST_CORNERS = 60, 400
"""Dots of a line, each of which tells its value, and corners: more are not told apart."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a line chart."""

    name: str
    points: Sequence[tuple[float, float]]
    """(x, y), in the order of x; at least one."""


@dataclass(frozen=True, kw_only=True)
class Bullet:
    """One row of a bullet chart: what was allowed, what was held, what was used."""

    name: str
    group: int
    """Its colour."""
    allowed: float | None
    held: float
    used: float


def line_chart(series: Sequence[Series], *, label: str, write: Write, over: str = "round", counts: bool = False) -> str:
    """Lines over rounds, each ending in its last value. Later lines are dashed, so that colour is not needed.

    The value axis starts at zero where the data come near it, and at the data where they do not. `over` names what the
    lines are over, where that is not rounds; `counts`, that values are whole numbers. Of a long line some of the points
    are drawn.
    """
    height, left, top, bottom = 230.0, 46.0, 12.0, 194.0
    right = _WIDE - 14 - 1.2 * LETTER * max(len(write(one.points[-1][1])) for one in series)
    points = [point for one in series for point in one.points]
    last = max(x for x, _ in points)
    first = min(x for x, _ in points) if over == "round" else 0.0  # what rounds cost begins with nothing
    low, high = min(y for _, y in points), max(y for _, y in points)
    if counts:
        low, high = 0.0, max(high, 1.0)
    marks = ticks(0.0 if 0 <= low < 0.4 * high else low, high, least=float(counts))

    def across(x: float) -> float:
        return left + (right - left) * ((x - first) / (last - first) if last > first else 0.5)

    def up(y: float) -> float:
        return bottom - (bottom - top) * (y - marks[0]) / (marks[-1] - marks[0])

    parts = [_value_axis(marks, left, right, up, write)]
    if over == "round":
        stride = every(int(last - first) + 1, right - left, 12 + LETTER * max(3, len(f"{last:.0f}")))
        shown: list[float] = [x for x in range(math.ceil(first), math.floor(last) + 1) if x % stride == 0]
    else:
        shown = [x for x in ticks(first, last) if first <= x <= last]
    parts.extend(text(across(x), bottom + 16, f"{x:,.6g}") for x in shown)
    parts.append(text((left + right) / 2, height - 3, over, "name"))
    for index, one in enumerate(series):
        corners = thinned(one.points, _MOST_CORNERS)
        parts.append(polyline(((across(x), up(y)) for x, y in corners), f"line {_line_kind(index)}"))
        many = len(one.points) > 30
        radius, kind = (5.0, "hover") if many else (2.8, f"dot {colour(index)}")
        for x, y in thinned(one.points, _MOST_DOTS):
            tip = f"{one.name}, {over} {x:.4g}: {write(y)}"
            parts.append(circle(across(x), up(y), radius, kind=kind, tip=tip))
    floor = -math.inf
    for y, index in sorted((up(one.points[-1][1]), index) for index, one in enumerate(series)):
        floor = max(y, floor + 14)  # Two lines that end together would write over each other.
        x, value = series[index].points[-1]
        parts.append(text(across(x) + 8, floor + 4, write(value), f"end {colour(index)}", "start"))
    return image(_WIDE, height, label, *parts)


def _value_axis(marks: Sequence[float], left: float, right: float, up: Callable[[float], float], write: Write) -> str:
    lines = (line(left, up(mark), right, up(mark), "grid" if index else "axis") for index, mark in enumerate(marks))
    return "".join(lines) + "".join(text(left - 7, up(mark) + 3.5, write(mark), anchor="end") for mark in marks)


def bullets(rows: Sequence[Bullet], *, label: str, total: float, write: Callable[[Bullet], str]) -> str:
    """A track as long as `total` per row: a mark at what is allowed, a pale bar for held, a full one for used."""
    left = 14 + LETTER * max(len(row.name) for row in rows)
    length = _WIDE - left - 10 - LETTER * max(len(write(row)) for row in rows)
    tall = 34.0
    parts = []
    for index, row in enumerate(rows):
        y, tip = index * tall + 6, f"{row.name}: {write(row)}"
        held, used = (length * min(1.0, value / total) for value in (row.held, row.used))
        parts.append(text(left - 8, y + 13, row.name, "row", "end"))
        parts.append(rect(left, y, length, 18, kind="track"))
        parts.append(rect(left, y, held, 18, kind=f"pale {colour(row.group)}", tip=tip))
        parts.append(rect(left, y + 5, used, 8, kind=f"fill {colour(row.group)}", tip=tip))
        if row.allowed is not None:
            x = left + length * min(1.0, row.allowed / total)
            parts.append(line(x, y - 4, x, y + 22, "limit"))
        parts.append(text(left + length + 8, y + 13, write(row), "row", "start"))
    return image(_WIDE, len(rows) * tall + 2, label, *parts)


def bars(rows: Sequence[tuple[str, int, Sequence[float]]], *, label: str, write: Write) -> str:
    """Horizontal bars of (name, colour, values): the first value of a row is full, later ones are pale."""
    values = [value for _, _, several in rows for value in several]
    left = 14 + LETTER * max(len(name) for name, _, _ in rows)
    length = _WIDE - left - 12 - LETTER * max(len(write(value)) for value in values)
    peak, thick, y = max(values) or 1.0, 13.0, 4.0
    parts = []
    for name, group, several in rows:
        parts.append(text(left - 8, y + thick * len(several) / 2 + 3, name, "row", "end"))
        for order, value in enumerate(several):
            reach, kind = length * value / peak, f"{'pale' if order else 'fill'} {colour(group)}"
            parts.append(rect(left, y, max(1.0, reach), thick - 2, kind=kind, tip=f"{name}: {write(value)}"))
            parts.append(text(left + reach + 6, y + 9.5, write(value), anchor="start"))
            y += thick
        y += 34.0 - thick * len(several)
    return image(_WIDE, y, label, *parts)


def shares(
    rows: Sequence[tuple[str, int, Mapping[str, int]]], *, label: str, kinds: Sequence[str], write: Callable[[int], str]
) -> str:
    """A bar as long as the whole for each of (name, colour, counts by kind), cut into its kinds in their order."""
    left = 14 + LETTER * max(len(name) for name, _, _ in rows)
    told = [write(index) for index in range(len(rows))]
    length, tall = _WIDE - left - 4, 40.0
    parts = []
    for index, (name, group, counts) in enumerate(rows):
        x, y, total = left, index * tall + 2, sum(counts.values()) or 1
        parts.append(text(left - 8, y + 12, name, f"group {colour(group)}", "end"))
        for kind in kinds:
            wide = length * counts.get(kind, 0) / total
            if wide:
                tip = f"{name}: {counts[kind]} {kind}"
                parts.append(rect(x, y, max(1.5, wide - 0.8), 16, kind=f"mark-{kind}", tip=tip, radius=1))
            x += wide
        parts.append(text(left, y + 29, told[index], anchor="start"))
    return image(_WIDE, len(rows) * tall, label, *parts)


def scatter(
    points: Sequence[tuple[float, float, int, str]], *, label: str, over: str, write: Write, from_zero: bool = False
) -> str:
    """A dot for each (x, y, colour, what it is); its values are told. `over` is what x is."""
    height, left, right, top, bottom = 230.0, 46.0, _WIDE - 12.0, 12.0, 194.0
    xs, ys = [x for x, _, _, _ in points], [y for _, y, _, _ in points]
    across = ticks(0.0 if min(xs) < 0.4 * max(xs) else min(xs), max(xs))
    up = ticks(0.0 if from_zero or 0 <= min(ys) < 0.4 * max(ys) else min(ys), max(ys))
    radius = 4.0 if len(points) <= 60 else 2.6

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (right - left) * (x - across[0]) / (across[-1] - across[0]),
            bottom - (bottom - top) * (y - up[0]) / (up[-1] - up[0]),
        )

    parts = [_value_axis(up, left, right, lambda y: place(0, y)[1], write)]
    stride = every(len(across), right - left, 12 + LETTER * len(f"{across[-1]:,.6g}"))
    parts.extend(text(place(x, 0)[0], bottom + 16, f"{x:,.6g}") for x in across[::stride])
    parts.append(text((left + right) / 2, height - 3, over, "name"))
    for x, y, group, what in points:
        tip = f"{what}: {x:,.6g} {over}, {write(y)}"
        parts.append(circle(*place(x, y), radius, kind=f"bubble {colour(group)}", tip=tip))
    return image(_WIDE, height, label, *parts)


def stacked_columns(
    columns: Sequence[tuple[str, Sequence[float]]], *, label: str, parts_named: Sequence[tuple[str, int]], write: Write
) -> str:
    """A column per round or run of rounds, its parts stacked in the order of `parts_named`: (name, colour)."""
    height, left, right, top, bottom = 230.0, 46.0, _WIDE - 6.0, 12.0, 194.0
    marks = ticks(0.0, max(sum(values) for _, values in columns), 4)
    room = (right - left) / len(columns)
    thick = min(44.0, room * (0.72 if room > 4 else 1.0))

    def up(value: float) -> float:
        return bottom - (bottom - top) * value / marks[-1]

    parts = [_value_axis(marks, left, right, up, write)]
    stride = every(len(columns), right - left, 12 + LETTER * max(len(name) for name, _ in columns))
    for index, (name, values) in enumerate(columns):
        middle, height_below = left + (index + 0.5) * room, 0.0
        for part, value in enumerate(values):
            upper, lower = up(height_below + value), up(height_below)
            height_below += value
            if lower - upper >= 0.05:
                tip = f"{rounds_named(name)}, {parts_named[part][0]}: {write(value)}"
                kind = f"fill {colour(parts_named[part][1])}"
                parts.append(rect(middle - thick / 2, upper, thick, lower - upper, kind=kind, tip=tip, radius=0))
        if index % stride == 0:
            parts.append(text(middle, bottom + 16, name))
    parts.append(text((left + right) / 2, height - 3, "round", "name"))
    return image(_WIDE, height, label, *parts)


def rounds_named(name: str) -> str:
    """A round, or a mean over several: "round 7", "mean of rounds 7–9"."""
    return f"mean of rounds {name}" if "–" in name else f"round {name}"


def legend(names: Sequence[str], *, lines: bool = False) -> str:
    """HTML: the names of the categories, each beside its colour, drawn as `line_chart` draws it if `lines`."""
    entries = (
        f'<span class="key {_line_kind(index) if lines else colour(index)}"><i></i>{escape(name)}</span>'
        for index, name in enumerate(names)
    )
    return f'<p class="legend{" lines" if lines else ""}">{"".join(entries)}</p>'


def _line_kind(index: int) -> str:
    return f"{colour(index)} dashed" if index else colour(index)


def scale(low: str, high: str) -> str:
    """HTML: the steps of the sequential scale between what its ends mean."""
    steps = "".join(f'<i class="h{index}"></i>' for index in range(1, STEPS + 1))
    return f'<p class="legend"><span class="scale">{escape(low)}<span>{steps}</span>{escape(high)}</span></p>'
