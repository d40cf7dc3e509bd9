"""What the run has spent of its clients' privacy, where its model is private."""

from collections.abc import Mapping
from typing import Any

from hfedmoe_ray.tracking import charts
from hfedmoe_ray.tracking.charts import Series
from hfedmoe_ray.tracking.markup import figure, section
from hfedmoe_ray.tracking.record import RunRecord


def privacy(run: RunRecord) -> str:
    """Epsilon after each round, and what it does and does not cover."""
    options = ((run.config.get("privacy") or {}).get("central")) or {}
    spent = [(report.round, report.privacy) for report in run.rounds if "epsilon" in report.privacy]
    if not spent:
        return _of_examples(run)
    points = [(float(round), told["epsilon"]) for round, told in spent if told["epsilon"] is not None]
    last = spent[-1][1]
    if not points:
        return section("Privacy", f"{_void(options)}Changes were clipped, but there was no noise: epsilon is infinite.")
    intro = (
        f"{_void(options)}Whoever sees all models of this run learns of whether one client took part no more than "
        f"epsilon {points[-1][1]:.3g} at delta {last['delta']:g} allows: noise of {last['noise_multiplier']:.3g} times "
        f"the clipping norm {options['clip']:g} on each of {int(last['releases'])} models, added up by the accountant "
        f"{options['accountant']}. The server itself sees each update. Other runs on the same clients add to it."
    )
    image = charts.line_chart(
        [Series(name="epsilon", points=points)],
        label="Epsilon over rounds",
        write=lambda value: f"{value:.3g}",
        over="round",
    )
    return section("Privacy", intro, figure("Epsilon spent", image)) + _of_examples(run)


def _of_examples(run: RunRecord) -> str:
    """What clients' steps have spent, where each example is protected."""
    told = [report.privacy for report in run.rounds if "example_epsilon" in report.privacy]
    if not told:
        return ""
    options = (run.config.get("privacy") or {}).get("examples") or {}
    void = "Void, as the noise was drawn from a seed. " if options.get("noise_seed") is not None else ""
    return section(
        "Privacy of examples",
        f"{void}What a client trained tells of one of its examples no more than epsilon "
        f"{told[-1]['example_epsilon']:.3g} at delta {told[-1]['example_delta']:g} allows, also to the server: the "
        "figure of the client with fewest examples, had it been asked in every round.",
    )


def _void(options: Mapping[str, Any]) -> str:
    """Why the figures hold for nobody, if they do not."""
    if options.get("noise_seed") is not None:
        return "Void: the noise was drawn from a seed in the configuration, so anybody can subtract it. "
    if options.get("record") == "full":
        return "Void for who sees this page, as it tells what clients measured and who took part. "
    return ""
