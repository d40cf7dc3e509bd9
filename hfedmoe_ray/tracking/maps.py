"""Charts with a mark for each row and column, drawn with the marks of `svg`: what is how much where."""

import math
from collections.abc import Callable, Mapping, Sequence

from hfedmoe_ray.tracking.charts import Write
from hfedmoe_ray.tracking.svg import LETTER, circle, colour, every, hover, image, line, path, rect, step, text

_MOST_TOLD = 4096
"""Cells of a heat map up to which each is a mark of its own, and tells its value."""


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
    parts = [text(left - 7, (r + 0.5) * tall + 3, name, anchor="end") for r, name in enumerate(rows)]
    if count * len(rows) > _MOST_TOLD:
        parts += _cells(values, peak, left=left, top=0.0, wide=wide, tall=tall, gap=gap)
    for r, row in enumerate(values if count * len(rows) <= _MOST_TOLD else ()):
        for c, value in enumerate(row):
            x, y, shade = left + c * wide, r * tall, step(value, peak)
            parts.append(rect(x, y, wide - gap, tall - gap, kind=f"h{shade}", tip=describe(r, c), radius=2 * gap - 1))
            if write and value > 0 and wide >= 20 and len(write(value)) * LETTER < wide:
                parts.append(text(x + (wide - gap) / 2, y + tall / 2 + 3, write(value), f"inside on{shade}"))
    stride = every(count, wide * count, LETTER * len(str(count)) + 7)
    parts.extend(text(left + (c + 0.5) * wide - gap / 2, bottom + 13, str(c)) for c in range(0, count, stride))
    parts.append(text(left + wide * count / 2, bottom + 29, columns, "name"))
    return image(left + wide * count + 4, bottom + 34, label, *parts)


def history(
    values: Sequence[Sequence[float]],
    *,
    label: str,
    name: str,
    columns: Sequence[str],
    peak: float,
    describe: Callable[[int], str],
) -> str:
    """What became of each row over the columns: cells coloured from 0 to `peak`, one path for each shade.

    There may be very many cells, so a row tells its values, not each of them.
    """
    left, top = 30.0, 20.0
    wide = min(26.0, 330.0 / len(columns))
    tall = min(14.0, max(2.0, 230.0 / len(values)))
    gap = 1.0 if min(wide, tall) > 5 else 0.0
    right, bottom = left + wide * len(columns), top + tall * len(values)
    parts = [
        text(left, 11, name, "row", "start"),
        *_cells(values, peak, left=left, top=top, wide=wide, tall=tall, gap=gap),
    ]
    parts.extend(hover(left, top + r * tall, right - left, tall, describe(r)) for r in range(len(values)))
    stride = every(len(values), bottom - top, 13)
    parts.extend(
        text(left - 6, top + (r + 0.5) * tall + 3.5, str(r), anchor="end") for r in range(0, len(values), stride)
    )
    stride = every(len(columns), right - left, LETTER * max(map(len, columns)) + 8)
    parts.extend(text(left + (c + 0.5) * wide, bottom + 14, columns[c]) for c in range(0, len(columns), stride))
    return image(right + 8, bottom + 18, label, *parts)


def _cells(
    values: Sequence[Sequence[float]], peak: float, *, left: float, top: float, wide: float, tall: float, gap: float
) -> list[str]:
    """The cells of a grid, one path for each shade: a fifth of the text that a mark for each would take."""
    shades: dict[int, list[str]] = {}
    for r, row in enumerate(values):
        for c, value in enumerate(row):
            cell = f"M{left + c * wide:.1f} {top + r * tall:.1f}h{wide - gap:.1f}v{tall - gap:.1f}h{gap - wide:.1f}z"
            shades.setdefault(step(value, peak), []).append(cell)
    return [path("".join(cells), f"h{shade}") for shade, cells in sorted(shades.items())]


def marks(
    rows: Sequence[tuple[str, int, Sequence[str]]],
    *,
    label: str,
    columns: Sequence[str],
    letters: Mapping[str, str],
    describe: Callable[[int, int], str],
    corner: str,
) -> str:
    """A cell for each of (name, colour, kinds): what kind of thing happened there, by colour and by its letter.

    A kind of "" is drawn as an empty cell. `corner` says what the columns are.
    """
    left, tall, top = 12 + LETTER * max([len(name) for name, _, _ in rows] + [len(corner)]), 15.0, 2.0
    wide = min(16.0, max(7.0, 560.0 / len(columns)))
    bottom = top + tall * len(rows)
    parts = []
    for r, (name, group, kinds) in enumerate(rows):
        parts.append(text(left - 7, top + (r + 0.5) * tall + 3.5, name, f"group {colour(group)}", "end"))
        for c, kind in enumerate(kinds):
            x, y = left + c * wide, top + r * tall
            tip = describe(r, c) if kind else ""
            parts.append(rect(x, y, wide - 1.5, tall - 1.5, kind=f"mark-{kind or 'none'}", tip=tip))
            if letter := letters.get(kind):
                parts.append(text(x + (wide - 1.5) / 2, y + tall / 2 + 3, letter, "letter"))
    parts.append(text(left - 7, bottom + 13, corner, "name", "end"))
    stride = every(len(columns), wide * len(columns), LETTER * max(map(len, columns)) + 8)
    parts.extend(text(left + (c + 0.45) * wide, bottom + 13, columns[c]) for c in range(0, len(columns), stride))
    return image(left + wide * len(columns) + 8, bottom + 18, label, *parts)


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
