"""What was learnt: accuracy and loss over rounds, and over what the rounds cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate

from hfedmoe_ray.records import RoundReport
from hfedmoe_ray.tracking import charts
from hfedmoe_ray.tracking.benchmarks import measures
from hfedmoe_ray.tracking.charts import Series, Write
from hfedmoe_ray.tracking.markup import figure, section, switch, table
from hfedmoe_ray.tracking.record import RunRecord

Measured = Sequence[tuple[str, Sequence[float | None]]]
"""(what, its value in every round)."""


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """What accuracy is drawn over."""

    name: str
    """As the reader chooses it."""
    unit: str
    """As the axis calls it."""
    places: Sequence[float]
    """Where each round lies."""


def learning(run: RunRecord) -> str:
    """Accuracy and loss, over rounds, time and bytes as the reader chooses."""
    accuracy: Measured = [
        ("global model, test set", [report.accuracy for report in run.rounds]),
        ("clients, own test data", [report.own_accuracy for report in run.rounds]),
    ]
    loss: Measured = [
        ("global model, test set", [report.test_loss for report in run.rounds]),
        ("clients, training data", [report.loss for report in run.rounds]),
    ]
    axes = _axes(run.rounds)
    panes = [
        (
            axis.name,
            _chart("Accuracy", accuracy, axis, lambda share: f"{100 * share:.3g} %")
            + _chart("Loss", loss, axis, lambda value: f"{value:.3g}"),
        )
        for axis in axes
    ]
    if not any(pane for _, pane in panes):
        return section("Learning", "No round has been measured.")
    intro = (
        "Each client's own test data have their own mix of classes; it is tested on them with its resident experts."
        if any(report.own_accuracy is not None for report in run.rounds)
        else ""
    )
    if any(axis.name == "simulated time" for axis in axes):
        waits = "waits for nobody" if run.config.get("asynchronous") else "waits for its slowest client"
        intro += (
            " Simulated time is arithmetic, not measured: what each round's work would take on the devices that the "
            f"tiers stand for, where a round {waits} and evaluation takes no time."
        )
    pairs = switch("Over", [(name, f'<div class="pair">{pane}</div>') for name, pane in panes])
    return section("Learning", intro, pairs, _benchmarks(run))


def _benchmarks(run: RunRecord) -> str:
    """What the global model answered before the first round and after the last, if it was asked."""
    asked = run.summary.get("benchmarks") or {}
    rows = [
        (escape(name), str(moments["after"]["items"]), measure, before, measures(moments["after"])[measure])
        for name, moments in asked.items()
        for measure, before in measures(moments["before"]).items()
    ]
    if not rows:
        return ""
    headings = ["Benchmark", "*Items", "Measure", "*Before", "*After"]
    note = (
        "Accuracy is of multiple choice, by log-likelihood of the choice after the prompt, as it is and divided by its "
        "characters; exact match of what the model writes; perplexity of given texts, where less is better."
    )
    return figure("Benchmarks", table(headings, rows), note=note)


def _axes(rounds: Sequence[RoundReport]) -> list[_Axis]:
    axes = [_Axis(name="rounds", unit="round", places=[float(report.round) for report in rounds])]
    simulated = [report.simulated_seconds for report in rounds if report.simulated_seconds is not None]
    if len(simulated) == len(rounds) > 0:
        axes.append(_timed("simulated time", "simulated ", simulated))
    traffic = list(accumulate(report.bytes_up + report.bytes_down for report in rounds))
    if traffic and traffic[-1]:
        scale, unit = (2**30, "GiB") if traffic[-1] >= 2 * 2**30 else (2**20, "MiB")
        places = [count / scale for count in traffic]
        axes.append(_Axis(name="bytes sent", unit=f"{unit} sent, both ways", places=places))
    if rounds and any(report.seconds for report in rounds):
        axes.append(_timed("wall time", "", [report.seconds for report in rounds]))
    return axes


def _timed(name: str, kind: str, seconds: Sequence[float]) -> _Axis:
    """The clock at the end of each round, in the unit that fits."""
    clock = list(accumulate(seconds))
    limits = ((3 * 3600, 3600, "h"), (300, 60, "min"), (0, 1, "s"))
    scale, unit = next((scale, unit) for least, scale, unit in limits if clock[-1] >= least)
    return _Axis(name=name, unit=f"{kind}{unit}", places=[time / scale for time in clock])


def _chart(caption: str, measured: Measured, axis: _Axis, write: Write) -> str:
    series = [
        Series(name=name, points=points)
        for name, values in measured
        if (points := [(x, y) for x, y in zip(axis.places, values, strict=True) if y is not None])
    ]
    if not series:
        return ""
    image = charts.line_chart(series, label=f"{caption} over {axis.name}", write=write, over=axis.unit)
    return figure(caption, charts.legend([one.name for one in series], lines=True) + image)
