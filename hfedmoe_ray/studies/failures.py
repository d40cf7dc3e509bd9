"""Clients whose training fails: rounds to a target and accuracy against the failure rate (arXiv 2601.00583).

A client of a round drops out, by lot, after it has trained (`clients.failure_rate`). Whoever fails at one rate also
fails at every higher one, so that rates differ by the added failures alone.
"""

from collections.abc import Mapping, Sequence

from hfedmoe_ray.studies.outcomes import common_target, interval, mean_accuracies, outcome
from hfedmoe_ray.studies.plots import Curve, curves
from hfedmoe_ray.studies.runs import make_runs
from hfedmoe_ray.studies.statistics import Mean, mean_of
from hfedmoe_ray.studies.study import Figure, Findings, Setting, Study, Table
from hfedmoe_ray.tracking.charts import Write, legend
from hfedmoe_ray.tracking.formatting import percent
from hfedmoe_ray.tracking.record import RunRecord

RATES = (0.0, 0.2, 0.4, 0.6)
STRATEGIES = ("hfedmoe", "random")
GAIN = 0.5
"""The target, where the configuration names none: this share of what training gains without failures."""


def measure(setting: Setting) -> Findings:
    """Accuracy and rounds to target of every strategy at every rate."""
    variants = {
        f"{name}, {percent(rate, 0)}": [f"strategy={name}", f"clients.failure_rate={rate}"]
        for name in STRATEGIES
        for rate in RATES
    }
    runs = make_runs(setting, variants)
    found = {name: {rate: runs[f"{name}, {percent(rate, 0)}"] for rate in RATES} for name in STRATEGIES}
    ended = {name: {rate: outcome(some) for rate, some in rates.items()} for name, rates in found.items()}
    target = setting.experiment(setting.seeds[0]).evaluate.target or common_target(
        (mean_accuracies(rates[0.0]) for rates in found.values()), GAIN
    )
    rounds = max(report.round for report in found[STRATEGIES[0]][0.0][0].rounds)
    needed = {
        name: {rate: [rounds_to(run, target) for run in some] for rate, some in rates.items()}
        for name, rates in found.items()
    }
    late = {
        name: {rate: mean_of([float(rounds + 1 if n is None else n) for n in some]) for rate, some in rates.items()}
        for name, rates in needed.items()
    }
    lost = {name: {rate: _lost(some) for rate, some in rates.items()} for name, rates in found.items()}
    worst = RATES[-1]
    sayings = "; ".join(
        f"{name} goes from {percent(ended[name][0.0].accuracy.mean)} to {percent(ended[name][worst].accuracy.mean)} "
        f"and needs {late[name][0.0].mean:.1f} against {late[name][worst].mean:.1f} rounds"
        for name in STRATEGIES
    )
    first = STRATEGIES[0]
    drop = 100 * (ended[first][0.0].accuracy.mean - ended[first][worst].accuracy.mean)
    return Findings(
        numbers={
            "target": target,
            "rounds": rounds,
            "outcomes": ended,
            "rounds_to_target": needed,
            "updates_lost": lost,
        },
        headline=(
            f"With {percent(worst, 0)} of the updates lost, {first} ends {abs(drop):.1f} points "
            f"{'below' if drop > 0 else 'above'} where it ends without failures."
        ),
        paragraph=(
            f"Between no failures and a rate of {percent(worst, 0)}, {sayings} to a test accuracy of "
            f"{percent(target)}. A run that does not reach it in {rounds} rounds counts as {rounds + 1}, which is too "
            "few. A client that fails has trained; its update is lost, and nothing is sent in its place."
        ),
        figures=[
            _figure(
                "Accuracy after the last round",
                {name: {rate: one.accuracy for rate, one in rates.items()} for name, rates in ended.items()},
                lambda share: f"{100 * share:.1f} %",
            ),
            _figure(f"Rounds to {percent(target)}", late, lambda rounds: f"{rounds:.1f}"),
        ],
        tables=[
            Table(
                title="By failure rate",
                headings=["Strategy", "*Rate", "*Updates lost", "*Global", "*Own", "*Rounds to target", "*Reached"],
                rows=[
                    [
                        name,
                        percent(rate, 0),
                        percent(lost[name][rate]),
                        interval(ended[name][rate].accuracy),
                        interval(ended[name][rate].own_accuracy),
                        f"{late[name][rate].mean:.1f}",
                        f"{sum(n is not None for n in needed[name][rate])} of {len(setting.seeds)}",
                    ]
                    for name in STRATEGIES
                    for rate in RATES
                ],
                note=f"Mean ± half of the 95 % interval over {len(setting.seeds)} seeds. Target: {percent(target)}.",
            )
        ],
    )


def rounds_to(run: RunRecord, target: float) -> int | None:
    """The first round whose accuracy is at least the target."""
    return next((one.round for one in run.rounds if one.accuracy is not None and one.accuracy >= target), None)


def _lost(runs: Sequence[RunRecord]) -> float:
    trained = [result for run in runs for result in run.results if result.round > 0]
    return sum(result.status != "ok" for result in trained) / len(trained)


def _figure(caption: str, values: Mapping[str, Mapping[float, Mean]], write: Write) -> Figure:
    lines = [
        Curve(
            name=name,
            points=[(rate, one.mean) for rate, one in rates.items()],
            spread=[(one.low, one.high) for one in rates.values()],
        )
        for name, rates in values.items()
    ]
    image = curves(
        lines, label=f"{caption}, by failure rate", across="failure rate", write=write, write_x=lambda x: percent(x, 0)
    )
    return Figure(caption=caption, html=legend(list(values), lines=True) + image)


STUDY = Study(
    name="failures",
    title="When clients fail",
    shows="accuracy and rounds to a target against the rate at which clients fail",
    cost="16 runs, about 5 minutes",
    config="study_small.yaml",
    measure=measure,
    seeds=(0, 1),
)
