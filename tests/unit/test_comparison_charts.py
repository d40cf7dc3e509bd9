"""The charts of a comparison: each line can be followed, however many there are, and panels can be compared."""

import pytest
from html_page import Page

from hfedmoe_ray.comparison.charts import TOGETHER, Curve, curves


def drawn(count):
    lines = [
        Curve(name=f"strategy-{n}", number=n, points=[(0, 0.5), (4, 0.5 + 0.01 * n)], band=[(0.4, 0.6), (0.4, 0.7)])
        for n in range(count)
    ]
    html = curves(
        lines, label="Accuracy", across_is="round", write_x=lambda x: f"{x:g}", write_y=lambda y: f"{100 * y:.0f} %"
    )
    return Page(html)


def elements(page, tag, kind):
    return sum((t, n) == (tag, "class") and kind in value.split() for t, n, value in page.attributes)


def test_few_lines_share_a_chart_and_differ_in_their_looks():
    page = drawn(TOGETHER)
    assert elements(page, "svg", "chart") == 1
    looks = {value for tag, name, value in page.attributes if (tag, name) == ("polyline", "class")}
    assert len(looks) == TOGETHER


@pytest.mark.parametrize("count", [TOGETHER + 1, 14])
def test_of_many_lines_each_has_a_panel_with_the_others_behind_it_over_the_same_axes(count):
    page = drawn(count)
    assert elements(page, "svg", "chart") == count
    assert elements(page, "polyline", "line") == count
    assert elements(page, "polyline", "ghost") == count * count
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert labels == [f"Accuracy: strategy-{n}" for n in range(count)]
    lines = {value for tag, name, value in page.attributes if (tag, name) == ("polyline", "points")}
    assert len(lines) == count, "a line lies elsewhere in another panel: the axes differ"
