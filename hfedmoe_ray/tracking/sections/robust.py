"""What a robust rule took the place of the mean with, and whom and what it held back."""

from collections.abc import Mapping
from typing import Any

from hfedmoe_ray.tracking import charts
from hfedmoe_ray.tracking.charts import Series
from hfedmoe_ray.tracking.formatting import plural, short
from hfedmoe_ray.tracking.markup import figure, section
from hfedmoe_ray.tracking.record import RunRecord


def robust(run: RunRecord) -> str:
    """Round by round, how many updates were scaled down, and how many experts kept their value; empty without."""
    told = [(report.round, report.robust) for report in run.rounds if report.robust]
    if not told:
        return ""
    options = run.config.get("robust") or {}
    rule = str(options.get("rule", "mean")).replace("_", " ")
    averaged = "the mean" if rule == "mean" else f"{rule} in the place of the mean"
    intro = f"Of each expert, each router and the shared parameters by itself: {averaged}."
    figures = ""
    for kind, drawn, caption, note in _kinds(options):
        points = [(float(round), counts[kind]) for round, counts in told]
        image = charts.line_chart(
            [Series(name=drawn, points=points)], label=f"{caption} over rounds", write=short, counts=True
        )
        total = sum(count for _, count in points)
        figures += figure(
            caption, image, note=f"{plural(round(total), drawn)} in {plural(len(points), 'round')}: {note}"
        )
    return section("Robust aggregation", intro, f'<div class="pair">{figures}</div>' if figures else "")


def _kinds(options: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """What the configuration lets happen: its key in `RoundReport.robust`, what is counted, a caption and a note."""
    kinds = []
    if limits := [name for name in ("clip", "clip_median") if options.get(name) is not None]:
        settings = ", ".join(f"{name} {options[name]:g}" for name in limits)
        kinds.append(("clipped", "update", "Updates scaled down", f"their change was larger than {settings} allows."))
    least = options.get("min_contributors", 1)
    if least > 1:
        why = f"fewer than {least} clients had trained them, so they kept their value."
        kinds.append(("withheld", "expert", "Experts withheld", why))
    return kinds
