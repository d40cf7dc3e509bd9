"""The charts of a comparison, drawn with the marks of `tracking.svg`; colours and dashes tell strategies apart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from hfedmoe_ray.tracking.charts import Write
from hfedmoe_ray.tracking.markup import key
from hfedmoe_ray.tracking.svg import LETTER, circle, colour, every, image, line, polyline, text, ticks

_WIDE, _HIGH = 440.0, 300.0
_PANEL = (250.0, 165.0)
TOGETHER = 6
"""Lines that one chart holds so that each can be followed; of more, each has a panel of its own."""
DASHES = 4
"""Line styles; with the colours they tell 32 strategies apart."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One strategy's line, and the band of its seeds."""

    name: str
    number: int
    """Its place among the strategies: decides colour and dashes."""
    points: Sequence[tuple[float, float]]
    """(x, mean), at least one."""
    band: Sequence[tuple[float, float]] = ()
    """(lowest, highest) at each point; empty for none."""


@dataclass(frozen=True, kw_only=True)
class Dots:
    """One strategy's clients."""

    name: str
    number: int
    before: Sequence[float]
    after: Sequence[float]
    """Empty where it was not measured."""


def style(number: int) -> str:
    """The classes of a strategy's line."""
    return f"{colour(number)} d{number % DASHES}"


def legend(names: Sequence[tuple[str, int]]) -> str:
    """HTML: names beside the lines that stand for them."""
    entries = "".join(
        f'<span class="entry"><svg width="30" height="10" aria-hidden="true"><line class="line {style(number)}" '
        f'x1="1" y1="5" x2="29" y2="5"/></svg>{escape(name)}</span>'
        for name, number in names
    )
    return f'<p class="legend">{entries}</p>'


def curves(
    drawn: Sequence[Curve],
    *,
    label: str,
    across_is: str,
    write_x: Write,
    write_y: Write,
    dots: bool = True,
    whole: bool = False,
) -> str:
    """Lines over any quantity, with bands: one chart of them all, or where they are many a panel for each.

    In a panel all others are drawn behind in grey, so that panels can be compared.

    Args:
        drawn: The lines.
        label: Text alternative.
        across_is: What x is.
        write_x: How it is written.
        write_y: How values are written.
        dots: Whether each point is marked.
        whole: Whether x counts something, so that only whole numbers are marked.
    """
    options = _Options(across_is=across_is, write_x=write_x, write_y=write_y, dots=dots, whole=whole)
    if len(drawn) <= TOGETHER:
        return _chart(drawn, (), label, options, (_WIDE, _HIGH))
    panels = "".join(
        f'<div class="panel"><p>{key(one.name, one.number)}</p>'
        f"{_chart([one], drawn, f'{label}: {one.name}', options, _PANEL)}</div>"
        for one in drawn
    )
    return f'<div class="many">{panels}</div>'


@dataclass(frozen=True, kw_only=True)
class _Options:
    """See `curves`."""

    across_is: str
    write_x: Write
    write_y: Write
    dots: bool
    whole: bool


def _chart(
    drawn: Sequence[Curve], behind: Sequence[Curve], label: str, options: _Options, size: tuple[float, float]
) -> str:
    """Lines in front of others that are there for comparison, over axes that fit them all."""
    across_is, write_x, write_y = options.across_is, options.write_x, options.write_y
    everything = [*drawn, *behind]
    wide, tall = size
    left, top, bottom = 46.0, 12.0, tall - 36.0
    ending = [one for one in drawn if one.points[-1][0] == max(x for other in drawn for x, _ in other.points)]
    ending = ending if len(ending) == len(drawn) else []
    # Room for the last values of all, so that panels are alike.
    right = wide - 14 - max((1.2 * LETTER * len(write_y(one.points[-1][1])) for one in everything if ending), default=0)
    xs = [x for one in everything for x, _ in one.points]
    ys = [y for one in everything for _, y in one.points] + [y for one in everything for pair in one.band for y in pair]
    low, high = min(ys), max(ys)
    rows = ticks(0.0 if 0 <= low < 0.4 * high else low, high)
    first, last = min(xs), max(xs)

    def across(x: float) -> float:
        return left + (right - left) * ((x - first) / (last - first) if last > first else 0.5)

    def up(y: float) -> float:
        return bottom - (bottom - top) * (y - rows[0]) / (rows[-1] - rows[0])

    parts = [line(left, up(mark), right, up(mark), "grid" if index else "axis") for index, mark in enumerate(rows)]
    parts += [text(left - 7, up(mark) + 3.5, write_y(mark), anchor="end") for mark in rows]
    marks = [mark for mark in ticks(first, last, 5) if first <= mark <= last] if last > first else [first]
    marks = [mark for mark in marks if mark == int(mark) or not options.whole]
    stride = every(len(marks), right - left, 10 + LETTER * max((len(write_x(mark)) for mark in marks), default=1))
    parts += [text(across(mark), bottom + 16, write_x(mark)) for mark in marks[::stride]]
    parts.append(text((left + right) / 2, tall - 3, across_is, "name"))
    for one in behind:
        parts.append(polyline(((across(x), up(y)) for x, y in one.points), "ghost"))
    for one in drawn:
        if one.band:
            edge = [(across(x), up(y)) for (x, _), (y, _) in zip(one.points, one.band, strict=True)]
            edge += [(across(x), up(y)) for (x, _), (_, y) in reversed(list(zip(one.points, one.band, strict=True)))]
            corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in edge)
            parts.append(f'<polygon class="band {colour(one.number)}" points="{corners}"/>')
    for one in drawn:
        parts.append(
            polyline(
                ((across(x), up(y)) for x, y in one.points),
                f"line {colour(one.number) if behind else style(one.number)}",
            )
        )
        for index, (x, y) in enumerate(one.points if options.dots else ()):
            tip = f"{one.name}, {across_is} {write_x(x)}: {write_y(y)}"
            if one.band:
                tip += f" ({write_y(one.band[index][0])} to {write_y(one.band[index][1])} over seeds)"
            parts.append(circle(across(x), up(y), 2.6, kind=f"dot {colour(one.number)}", tip=tip))
    for one, y in zip(ending, _apart([up(one.points[-1][1]) for one in ending], top, bottom), strict=True):
        x, value = one.points[-1]
        parts.append(text(across(x) + 7, y + 4, write_y(value), f"end {colour(one.number)}", "start"))
    return image(wide, tall, label, *parts)


def _apart(heights: Sequence[float], top: float, bottom: float) -> list[float]:
    """Heights for labels, as near to those given as they can be without writing over each other."""
    gap = min(13.0, (bottom - top) / max(1, len(heights) - 1))
    order = sorted(range(len(heights)), key=lambda index: heights[index])
    placed = [0.0] * len(heights)
    floor = -math.inf
    for index in order:
        floor = placed[index] = max(heights[index], floor + gap)
    ceiling = bottom
    for index in reversed(order):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - gap
    return placed


def client_dots(rows: Sequence[Dots], *, label: str) -> str:
    """A dot per client on a line from 0 to 100 %: before above, after below; the mean and the worst tenth marked."""
    left, right, tall, y = 14.0, _WIDE - 20.0, 15.0, 4.0
    parts = []

    def across(share: float) -> float:
        return left + (right - left) * share

    bottom = 4.0 + sum(22.0 + tall * (1 + bool(row.after)) for row in rows)
    for tenth in range(0, 11, 2):
        parts.append(line(across(tenth / 10), 4, across(tenth / 10), bottom, "grid"))
        parts.append(text(across(tenth / 10), bottom + 14, f"{10 * tenth} %"))
    for row in rows:
        parts.append(text(left, y + 13, row.name, "row", "start"))
        y += 18
        for kind, when, values in (("hollow", "before", row.before), ("full", "after local training", row.after)):
            if not values:
                continue
            middle = y + tall / 2
            # Few accuracies are possible on a small test split, so many dots coincide; they are see-through.
            dot = f"client {kind} {colour(row.number)}"
            parts.extend(circle(across(value), middle, 3.2, kind=dot) for value in values)
            mean = sum(values) / len(values)
            worst = sorted(values)[: math.ceil(len(values) / 10)]
            for what, x in (("mean", mean), ("worst tenth", sum(worst) / len(worst))):
                tip = f"{row.name}, {when}: {what} {100 * x:.1f} %"
                kind_of = "mean" if what == "mean" else "worst"
                parts.append(
                    f'<line class="{kind_of}" x1="{across(x):.1f}" y1="{y + 1:.1f}" x2="{across(x):.1f}" '
                    f'y2="{y + tall - 1:.1f}"><title>{escape(tip)}</title></line>'
                )
            y += tall
        y += 4
    return image(_WIDE, bottom + 20, label, *parts)
