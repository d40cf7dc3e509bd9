"""The charts of a report, drawn with the marks of `svg`.

A chart is drawn for the width of a phone, may grow by a quarter, and scrolls rather than shrink below legibility.
Every mark carries its value as a tooltip, every chart a text alternative.
"""

import math
from collections.abc import Callable, Sequence
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
    step,
    text,
    ticks,
)

Write = Callable[[float], str]
"""How a value is written."""
_WIDE = 440.0
"""Natural width of a chart that stands beside another on a desk and fills a phone."""


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


def line_chart(series: Sequence[Series], *, label: str, write: Write, over: str = "round") -> str:
    """Lines over rounds, each ending in its last value. Later lines are dashed, so that colour is not needed.

    The value axis starts at zero where the data come near it, and at the data where they do not. `over` names what the
    lines are over, where that is not rounds.
    """
    height, left, top, bottom = 250.0, 46.0, 12.0, 214.0
    right = _WIDE - 14 - 1.2 * LETTER * max(len(write(one.points[-1][1])) for one in series)
    points = [point for one in series for point in one.points]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    marks = ticks(0.0 if 0 <= low < 0.4 * high else low, high)

    def across(x: float) -> float:
        return left + (right - left) * ((x - first) / (last - first) if last > first else 0.5)

    def up(y: float) -> float:
        return bottom - (bottom - top) * (y - marks[0]) / (marks[-1] - marks[0])

    parts = [_value_axis(marks, left, right, up, write)]
    stride = every(int(last - first) + 1, right - left, 12 + LETTER * max(3, len(f"{last:.0f}")))
    shown = (x for x in range(math.ceil(first), math.floor(last) + 1) if x % stride == 0)
    parts.extend(text(across(x), bottom + 16, str(x)) for x in shown)
    parts.append(text((left + right) / 2, height - 3, over, "name"))
    for index, one in enumerate(series):
        parts.append(polyline(((across(x), up(y)) for x, y in one.points), f"line {_line_kind(index)}"))
        radius = 2.8 if len(one.points) <= 40 else 1.4
        for x, y in one.points:
            tip = f"{one.name}, {over} {x:.4g}: {write(y)}"
            parts.append(circle(across(x), up(y), radius, kind=f"dot {colour(index)}", tip=tip))
    floor = -math.inf
    for y, index in sorted((up(one.points[-1][1]), index) for index, one in enumerate(series)):
        floor = max(y, floor + 14)  # Two lines that end together would write over each other.
        x, value = series[index].points[-1]
        parts.append(text(across(x) + 8, floor + 4, write(value), f"end {colour(index)}", "start"))
    return image(_WIDE, height, label, *parts)


def _value_axis(marks: Sequence[float], left: float, right: float, up: Callable[[float], float], write: Write) -> str:
    lines = (line(left, up(mark), right, up(mark), "grid" if index else "axis") for index, mark in enumerate(marks))
    return "".join(lines) + "".join(text(left - 7, up(mark) + 3.5, write(mark), anchor="end") for mark in marks)


def heat_map(
    values: Sequence[Sequence[float]],
    *,
    label: str,
    rows: Sequence[str],
    columns: str,
    peak: float,
    describe: Callable[[int, int], str],
    write: Write | None = None,
) -> str:
    """A cell for each [row][column], coloured from 0 to `peak`; `write` puts the value into cells that have room.

    `columns` is what the columns are, which are numbered from 0.
    """
    count = len(values[0])
    wide = min(26.0, max(9.0, 380.0 / count))
    tall, gap = max(wide, 13.0), 1.5 if wide >= 12 else 1.0
    left = 12 + LETTER * max(map(len, rows))
    bottom = tall * len(rows)
    parts = []
    for r, row in enumerate(values):
        parts.append(text(left - 7, (r + 0.5) * tall + 3, rows[r], anchor="end"))
        for c, value in enumerate(row):
            x, y, shade = left + c * wide, r * tall, step(value, peak)
            parts.append(rect(x, y, wide - gap, tall - gap, kind=f"h{shade}", tip=describe(r, c), radius=2 * gap - 1))
            if write and value > 0 and wide >= 20 and len(write(value)) * LETTER < wide:
                parts.append(text(x + (wide - gap) / 2, y + tall / 2 + 3, write(value), f"inside on{shade}"))
    stride = every(count, wide * count, LETTER * len(str(count)) + 7)
    parts.extend(text(left + (c + 0.5) * wide - gap / 2, bottom + 13, str(c)) for c in range(0, count, stride))
    parts.append(text(left + wide * count / 2, bottom + 29, columns, "name"))
    return image(left + wide * count + 4, bottom + 34, label, *parts)


def bubbles(
    values: Sequence[Sequence[int]],
    *,
    label: str,
    rows: Sequence[str],
    columns: Sequence[str],
    groups: Sequence[int],
    describe: Callable[[int, int], str],
    corner: str,
) -> str:
    """A circle for each [row][column] whose area is the value, coloured by the column's group.

    Below each column stand its name and, where there is room, its sum. `corner` says what the columns are.
    """
    wide = min(27.0, max(9.0, 900.0 / len(columns)))
    tall = min(wide, 20.0) if wide >= 12 else 12.0
    left = 12 + LETTER * max(map(len, [*rows, corner, "examples"]))
    right, bottom = left + wide * len(columns), 4 + tall * len(rows)
    peak = max([1, *map(max, values)])
    # Where there are many columns circles may overlap their neighbours, which hold little if this one holds much.
    largest = min(wide, tall) / 2 * (1.0 if wide >= 14 else 1.3)
    parts = []
    for r, name in enumerate(rows):
        parts.append(line(left, 4 + (r + 0.5) * tall, right, 4 + (r + 0.5) * tall))
        parts.append(text(left - 7, 4 + (r + 0.5) * tall + 3.5, name, anchor="end"))
    for r, row in enumerate(values):
        for c, value in enumerate(row):
            if value:
                radius = max(0.8, largest * math.sqrt(value / peak))
                x, y, kind = left + (c + 0.5) * wide, 4 + (r + 0.5) * tall, f"bubble {colour(groups[c])}"
                parts.append(circle(x, y, radius, kind=kind, tip=describe(r, c)))
    totals = [_thousands(sum(column)) for column in zip(*values, strict=True)]
    summed = max(map(len, totals)) * LETTER + 4 <= wide
    stride = every(len(columns), right - left, LETTER * max(map(len, columns)) + 8)
    parts.append(text(left - 7, bottom + 14, corner, "name", "end"))
    parts.extend(
        text(left + (c + 0.5) * wide, bottom + 14, columns[c], f"group {colour(groups[c])}")
        for c in range(0, len(columns), stride)
    )
    if summed:
        parts.append(text(left - 7, bottom + 29, "examples", "name", "end"))
        parts.extend(text(left + (c + 0.5) * wide, bottom + 29, total) for c, total in enumerate(totals))
    return image(right + 6, bottom + (36 if summed else 20), label, *parts)


def _thousands(count: int) -> str:
    return str(count) if count < 1000 else f"{count / 1000:.1f}k"


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


def stacked_columns(
    columns: Sequence[tuple[int, Sequence[float]]], *, label: str, names: Sequence[str], write: Write
) -> str:
    """A column per round, its parts stacked in the order of `names`."""
    height, left, right, top, bottom = 250.0, 46.0, _WIDE - 6.0, 12.0, 214.0
    marks = ticks(0.0, max(sum(values) for _, values in columns), 4)
    room = (right - left) / len(columns)
    thick = min(44.0, room * (0.72 if room > 4 else 1.0))

    def up(value: float) -> float:
        return bottom - (bottom - top) * value / marks[-1]

    parts = [_value_axis(marks, left, right, up, write)]
    stride = every(len(columns), right - left, 26)
    for index, (number, values) in enumerate(columns):
        middle, height_below = left + (index + 0.5) * room, 0.0
        for part, value in enumerate(values):
            upper, lower = up(height_below + value), up(height_below)
            height_below += value
            if lower - upper >= 0.05:
                tip, kind = f"round {number}, {names[part]}: {write(value)}", f"fill {colour(part)}"
                parts.append(rect(middle - thick / 2, upper, thick, lower - upper, kind=kind, tip=tip, radius=0))
        if index % stride == 0:
            parts.append(text(middle, bottom + 16, str(number)))
    parts.append(text((left + right) / 2, height - 3, "round", "name"))
    return image(_WIDE, height, label, *parts)


def strip(
    values: Sequence[float], *, before: Sequence[float] | None, even: float, peak: float, label: str, name: str
) -> str:
    """A small multiple: columns from 0 to `peak`, a dashed line at `even`, a tick where each column stood `before`."""
    width, left, top, bottom = 210.0, 6.0, 20.0, 84.0
    room = (width - 2 * left) / len(values)
    thick = room * (0.74 if room > 4 else 0.9)

    def up(value: float) -> float:
        return bottom - (bottom - top) * min(1.0, value / peak)

    parts = [text(left, 12, name, "row", "start"), line(left, bottom, width - left, bottom, "axis")]
    for index, value in enumerate(values):
        x = left + (index + 0.5) * room - thick / 2
        tip = f"expert {index}: {value:.3f}"
        parts.append(rect(x, up(value), thick, bottom - up(value), kind="fill c0", tip=tip, radius=1))
        if before is not None:
            parts.append(line(x - 0.5, up(before[index]), x + thick + 0.5, up(before[index]), "before"))
    parts.append(line(left, up(even), width - left, up(even), "even"))
    stride = every(len(values), width - 2 * left, 18)
    parts.extend(text(left + (i + 0.5) * room, bottom + 13, str(i)) for i in range(0, len(values), stride))
    return image(width, 100, label, *parts)


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
