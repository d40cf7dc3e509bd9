"""The colours of pages: text can be read on its paper, and categories told apart whatever one sees of red and green."""

import re
from importlib.resources import files
from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
SIGHT = {
    "all cones": np.eye(3),
    "no L cones": np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]),
    "no M cones": np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]),
}
# Linear RGB to Oklab (Ottosson 2020).
CONES = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
OKLAB = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])


def palettes() -> dict[str, dict[str, Array]]:
    light, dark = files("hfedmoe_ray.tracking").joinpath("report.css").read_text().split("prefers-color-scheme: dark")
    found = {}
    for scheme, text in (("light", light), ("dark", dark)):
        hexadecimal = dict(re.findall(r"--([\w-]+): #([0-9a-f]{6})\b", text))
        srgb = {name: np.array([int(h[i : i + 2], 16) for i in (0, 2, 4)]) / 255 for name, h in hexadecimal.items()}
        found[scheme] = {
            name: np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for name, c in srgb.items()
        }
    return found


def contrast(one: Array, other: Array) -> float:
    """As WCAG 2 defines it."""
    low, high = sorted(float(colour @ [0.2126, 0.7152, 0.0722]) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def distance(one: Array, other: Array, sight: Array) -> float:
    """In Oklab, whose lightness goes from 0 to 100 here."""
    seen = [OKLAB @ np.cbrt(CONES @ np.clip(sight @ colour, 0, 1)) for colour in (one, other)]
    return float(100 * np.linalg.norm(seen[0] - seen[1]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(scheme: str) -> None:
    colours = palettes()[scheme]
    for name in ("ink", "muted", "alarm", "c0", "c1", "c2", "c3"):
        assert contrast(colours[name], colours["paper"]) >= 4.45, name
    for step in range(1, 9):
        on = "on-low" if step < 5 else "on-high"
        assert contrast(colours[on], colours[f"h{step}"]) >= 3, f"a number on step {step}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("sight", SIGHT)
def test_categories_and_steps_are_told_apart(scheme: str, sight: str) -> None:
    colours = palettes()[scheme]
    for number, least in ((4, 7.5), (8, 3.0)):
        for one, other in combinations([f"c{n}" for n in range(number)], 2):
            assert distance(colours[one], colours[other], SIGHT[sight]) > least, f"{one} and {other}"
    lightness = [float((OKLAB @ np.cbrt(CONES @ colours[f"h{step}"]))[0]) for step in range(9)]
    assert lightness == sorted(lightness, reverse=scheme == "light"), "the scale gets darker, or by night lighter"
