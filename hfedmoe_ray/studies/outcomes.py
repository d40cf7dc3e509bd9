"""What runs of one variant came to, over seeds, and how it is drawn and tabled."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hfedmoe_ray.studies.plots import Estimate, estimates
from hfedmoe_ray.studies.statistics import Mean, mean_of
from hfedmoe_ray.studies.study import Figure
from hfedmoe_ray.tracking.formatting import percent, size
from hfedmoe_ray.tracking.record import RunRecord
from hfedmoe_ray.tracking.tiers import mean


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Results of one variant."""

    accuracy: Mean
    """Of the global model on the global test split, after the last round."""
    own_accuracy: Mean
    """Mean over clients on their own test splits, holding only their residents."""
    initial_accuracy: Mean
    bytes_up: float
    """Of a whole run, mean over seeds."""
    bytes_down: float
    peak_mib: float
    """Largest private memory of a client while it trained, mean over seeds."""
    step_seconds: float
    """Of one client's optimizer steps in a round, mean over clients, rounds and seeds."""


def outcome(runs: Sequence[RunRecord]) -> Outcome:
    """Puts together the runs of one variant, one per seed."""
    trained = [result for run in runs for result in run.results if result.status == "ok" and result.round > 0]
    return Outcome(
        accuracy=mean_of([run.summary["accuracy"] for run in runs]),
        own_accuracy=mean_of([run.summary["own_accuracy"] for run in runs]),
        initial_accuracy=mean_of([run.summary["initial_accuracy"] for run in runs]),
        bytes_up=mean([run.summary["bytes_up"] for run in runs]),
        bytes_down=mean([run.summary["bytes_down"] for run in runs]),
        peak_mib=mean([run.summary["peak_client_mib"] for run in runs]),
        step_seconds=mean([result.step_seconds for result in trained]),
    )


def outcomes(found: Mapping[str, Sequence[RunRecord]]) -> dict[str, Outcome]:
    """`outcome` of every variant."""
    return {name: outcome(runs) for name, runs in found.items()}


def interval(value: Mean) -> str:
    """A share and half of its interval: "62.3 ± 1.4 %"; without an interval "62.3 %"."""
    if len(value.values) == 1:
        return percent(value.mean)
    return f"{100 * value.mean:.1f} ± {100 * (value.high - value.mean):.1f} %"


def accuracy_figures(found: Mapping[str, Outcome], reference: str) -> list[Figure]:
    """Both accuracies of every variant, a dashed line at the one that is varied."""
    kinds = (
        ("Global model, test set", {name: one.accuracy for name, one in found.items()}),
        ("Clients, own test data", {name: one.own_accuracy for name, one in found.items()}),
    )
    return [
        Figure(
            caption=caption,
            html=estimates(
                [estimate(name, value, int(name != reference)) for name, value in values.items()],
                label=f"{caption}: accuracy by variant",
                write=lambda share: f"{100 * share:.1f} %",
                reference=values[reference].mean,
            ),
        )
        for caption, values in kinds
    ]


def estimate(name: str, value: Mean, group: int = 0) -> Estimate:
    """A mean as a row of `plots.estimates`."""
    return Estimate(name=name, mean=value.mean, low=value.low, high=value.high, values=value.values, group=group)


def costs(one: Outcome) -> list[str]:
    """Cells: bytes up, memory, seconds."""
    return [size(one.bytes_up), f"{one.peak_mib:.0f} MiB", f"{one.step_seconds:.2f} s"]


COST_HEADINGS = ("*Upload", "*Largest client", "*Steps of a round")


def by_seed(left: Mean, right: Mean) -> Mean:
    """Mean of the differences left - right seed by seed, which takes out what seeds have in common."""
    return mean_of([one - other for one, other in zip(left.values, right.values, strict=True)])


def certain(difference: Mean) -> bool:
    """Whether the interval of a difference leaves out 0; of one seed nothing is certain."""
    return len(difference.values) > 1 and (difference.low > 0 or difference.high < 0)


LEAST_GAIN = 0.01
"""A target lies at least so far above where runs start."""


def mean_accuracies(runs: Sequence[RunRecord]) -> list[float]:
    """Accuracy of the global model by evaluated round, mean over runs."""
    measured = [[report.accuracy for report in run.rounds if report.accuracy is not None] for run in runs]
    return [mean_of(values).mean for values in zip(*measured, strict=True)]


def common_target(accuracies: Iterable[Sequence[float]], share: float) -> float:
    """An accuracy to be reached, for strategies whose mean accuracies by round these are.

    It lies `share` of the way from the best start to what every strategy reaches, and at least a point above the start.
    """
    every = list(accuracies)
    start = max(points[0] for points in every)
    return start + max(share * (min(max(points) for points in every) - start), LEAST_GAIN)
