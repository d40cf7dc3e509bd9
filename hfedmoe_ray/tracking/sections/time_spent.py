"""Where the time went: phase by phase, and in one round slot by slot."""

from collections import Counter

from hfedmoe_ray.records import RoundReport
from hfedmoe_ray.tracking import charts
from hfedmoe_ray.tracking.formatting import duration, percent, plural
from hfedmoe_ray.tracking.markup import figure, key, section, table
from hfedmoe_ray.tracking.record import RunRecord
from hfedmoe_ray.tracking.sections.pieces import group, trains
from hfedmoe_ray.tracking.thinning import span_name, spans
from hfedmoe_ray.tracking.tiers import mean
from hfedmoe_ray.tracking.timeline import MOST_SLOTS, MOST_TASKS, stretch, timeline

_PHASES = {
    "plan": "who holds and trains which experts",
    "profile": "clients measure how they route",
    "agree": "clients agree on masks",
    "publish": "broadcast: weights go out",
    "train": "while there is work for every slot",
    "wait": "for the last clients",
    "reduce": "checking and averaging updates",
    "evaluate": "as far as rounds waited for it",
    "other": "",
}
"""In the order of a round."""
_MOST_COLUMNS = 60


def time_spent(run: RunRecord) -> str:
    """Where the time of each round went."""
    totals: Counter[str] = Counter()
    for report in run.rounds:
        totals.update(_phases(report))
    spent = sum(totals.values())
    if not spent:
        return ""
    names = [name for name in dict.fromkeys([*_PHASES, *totals]) if totals[name] >= 0.005 * spent]
    columns = spans(len(run.rounds), _MOST_COLUMNS)
    image = charts.stacked_columns(
        [
            (
                span_name([run.rounds[index].round for index in span]),
                [mean([_phases(run.rounds[index]).get(name, 0.0) for index in span]) for name in names],
            )
            for span in columns
        ],
        label="Seconds of each round by phase",
        parts_named=[(name, _colour(name)) for name in names],
        write=lambda seconds: f"{seconds:.3g} s",
    )
    shares = table(
        ["Phase", "*Time", "*Share", ""],
        [
            [key(name, _colour(name)), duration(totals[name]), percent(totals[name] / spent), _PHASES.get(name, "")]
            for name in names
        ],
        wrap=True,
    )
    longest = max(run.rounds, key=lambda report: report.seconds)
    intro = (
        f"{duration(sum(report.seconds for report in run.rounds))} in all; the longest was round {longest.round} with "
        f"{duration(longest.seconds)}. Phases below half a percent are left out."
    )
    caption = "Seconds by round" if len(columns) == len(run.rounds) else "Seconds by round, means of neighbours"
    pair = f'<div class="pair">{figure(caption, image)}<div>{shares}</div></div>'
    return section("Where the time went", intro, pair, _one_round(run))


def _colour(phase: str) -> int:
    """The same for a phase in every report."""
    return list(_PHASES).index(phase) if phase in _PHASES else len(_PHASES)


def _phases(report: RoundReport) -> dict[str, float]:
    """A round's seconds by phase, with what no phase accounts for."""
    rest = report.seconds - sum(report.phases.values())
    return {**report.phases, "other": max(0.0, rest)}


def _one_round(run: RunRecord) -> str:
    """Who was at work in the round of median length."""
    trained = sorted((report for report in run.rounds if trains(report)), key=lambda report: report.seconds)
    # The last round has no next one to end at, and evaluates what others do not.
    between = [report for report in trained if report.round != run.rounds[-1].round]
    if not between:
        return ""
    median = between[len(between) // 2].round
    drawn = stretch(run.events, median)
    if drawn is None:
        return ""
    groups = {client.client: group(run, client.tier) for client in run.clients}
    image = timeline(drawn, label=f"Tasks in round {median}, by slot", groups=groups)
    evaluates = any(turn.kind == "evaluate" for turn in drawn.turns)
    grey = '<span class="key"><i class="evaluates"></i>evaluation</span></p>' if evaluates else "</p>"
    legend = charts.legend(run.tiers).removesuffix("</p>") + grey
    note = (
        f"From the beginning of the round to that of the next. {plural(len(drawn.slots), 'slot')} were at work "
        f"{percent(drawn.busy, 0)} of the time; numbers are clients."
    )
    if len(drawn.turns) > MOST_TASKS or len(drawn.slots) > MOST_SLOTS:
        note += f" At most {MOST_SLOTS} slots and {MOST_TASKS} tasks are drawn."
    return figure(f"Round {median}, of median length, slot by slot", legend + image, note=note)
