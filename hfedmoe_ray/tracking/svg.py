"""Inline SVG, mark by mark: text in, text out, no drawing library, no script and no request to anywhere.

Colours are classes that `report.css` resolves for light and dark pages: `c0`..`c7` tell categories apart, `h0`..`h8`
are the steps of a sequential scale (`h0` is nothing at all). Lengths are in user units, near enough a pixel.
"""

import math
from collections.abc import Iterable
from html import escape

CATEGORIES = 8
"""Colours that tell categories apart; a ninth begins anew."""
STEPS = 8
"""Steps of the sequential scale."""
LETTER = 6.1
"""Width of a character of a label, for leaving room: an estimate, as no font is measured here."""


def image(width: float, height: float, label: str, *marks: str) -> str:
    """An image with a text alternative, scaled between 0.8 and 1.25 of its natural width."""
    style = f"max-width:{width * 1.25:.0f}px;min-width:{width * 0.8:.0f}px"
    return (
        f'<svg class="chart" viewBox="0 0 {width:.0f} {height:.0f}" style="{style}" role="img" '
        f'aria-label="{escape(label)}">{"".join(marks)}</svg>'
    )


def text(x: float, y: float, content: str, kind: str = "tick", anchor: str = "middle") -> str:
    """One line of text whose baseline starts, ends or is centred at (x, y)."""
    return f'<text class="{kind}" x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}">{escape(content)}</text>'


def rect(x: float, y: float, width: float, height: float, *, kind: str, tip: str = "", radius: float = 2.0) -> str:
    """A rectangle from its upper left corner; `tip` is told on hovering."""
    corner = f' rx="{_n(min(radius, width / 2, height / 2))}"' if radius else ""
    place = f'x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"'
    return f'<rect class="{kind}" {place}{corner}>{_title(tip)}</rect>'


def circle(x: float, y: float, radius: float, *, kind: str, tip: str = "") -> str:
    """A circle around (x, y)."""
    return f'<circle class="{kind}" cx="{_n(x)}" cy="{_n(y)}" r="{radius:.2f}">{_title(tip)}</circle>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> str:
    """A straight line."""
    return f'<line class="{kind}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>'


def polyline(points: Iterable[tuple[float, float]], kind: str) -> str:
    """A line through points."""
    return f'<polyline class="{kind}" points="{" ".join(f"{_n(x)},{_n(y)}" for x, y in points)}"/>'


def path(drawing: str, kind: str) -> str:
    """A shape drawn by path commands: one mark for very many cells."""
    return f'<path class="{kind}" d="{drawing}"/>'


def hover(x: float, y: float, width: float, height: float, tip: str) -> str:
    """A rectangle that is not seen and tells `tip`, over marks too many to tell anything each."""
    return rect(x, y, width, height, kind="hover", tip=tip, radius=0)


def _title(tip: str) -> str:
    return f"<title>{escape(tip)}</title>" if tip else ""


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def colour(index: int) -> str:
    """The class of category number `index`."""
    return f"c{index % CATEGORIES}"


def step(value: float, peak: float) -> int:
    """The step of the sequential scale, 0..8, for a value between 0 and `peak`; only nothing is step 0."""
    if value <= 0 or peak <= 0:
        return 0
    return min(STEPS, max(1, math.ceil(STEPS * value / peak)))


def ticks(low: float, high: float, about: int = 5, *, least: float = 0.0) -> list[float]:
    """Round numbers, about so many and at least so far from each other, that enclose low..high."""
    if high <= low:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    stride = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    stride = max(stride, least)
    first, last = math.floor(low / stride + 1e-9), math.ceil(high / stride - 1e-9)
    return [round(count * stride, 12) for count in range(first, last + 1)]


def every(count: int, room: float, needed: float) -> int:
    """The stride at which `count` labels, each needing `needed` of `room`, stay apart: 1, 2, 5, 10, 20, ..."""
    strides = (factor * 10**power for power in range(7) for factor in (1, 2, 5))
    return next((stride for stride in strides if stride * room / max(1, count) >= needed), count)
