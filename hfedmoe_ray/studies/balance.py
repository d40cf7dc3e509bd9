"""How evenly experts are trained over the rounds: FLEX-MoE against greedy, importance and random (2512.23070).

An expert's load is the number of clients that trained it so far; balance is the coefficient of variation of the loads
of all experts (0: all alike). FLEX-MoE balances assignments, and an assigned expert that no token chose does not train:
for its two variants the loads that it assigned itself are told too. Legend: L MoE layers, E experts.
"""

from collections.abc import Sequence

import numpy as np

from hfedmoe_ray.studies.continued import continued
from hfedmoe_ray.studies.outcomes import interval, outcomes
from hfedmoe_ray.studies.plots import Curve, curves
from hfedmoe_ray.studies.popularity import variation
from hfedmoe_ray.studies.runs import make_runs
from hfedmoe_ray.studies.statistics import Mean, mean_of
from hfedmoe_ray.studies.study import Figure, Findings, Setting, Study, Table
from hfedmoe_ray.tracking.charts import legend
from hfedmoe_ray.tracking.formatting import MISSING
from hfedmoe_ray.tracking.record import RunRecord
from hfedmoe_ray.types import FloatArray

FLEX, GREEDY = "flex_moe", "flex_moe, greedy"
STRATEGIES: dict[str, tuple[str, ...]] = {
    FLEX: ("strategy=flex_moe",),
    GREEDY: ("strategy=flex_moe", "strategy.tolerance=null"),
    "hfedmoe": ("strategy=hfedmoe",),
    "hfedmoe, coverage": ("strategy=hfedmoe", "strategy.coverage=0.5"),
    "random": ("strategy=random",),
}


def measure(setting: Setting) -> Findings:
    """Variation of the cumulative loads by round, and of what FLEX-MoE assigned."""
    found = make_runs(setting, STRATEGIES)
    ended = outcomes(found)
    by_round: dict[str, list[Mean]] = {
        name: [mean_of(values) for values in zip(*(variations(run) for run in runs), strict=True)]
        for name, runs in found.items()
    }
    assigned = {name: mean_of([variation(holders(run)) for run in found[name]]) for name in (FLEX, GREEDY)}
    last = {name: values[-1] for name, values in by_round.items()}
    even, uneven = min(last, key=lambda name: last[name].mean), max(last, key=lambda name: last[name].mean)
    ratio = assigned[GREEDY].mean / assigned[FLEX].mean if assigned[FLEX].mean else None
    rounds = len(by_round[FLEX])
    return Findings(
        numbers={
            "variation_by_round": by_round,
            "variation_of_assigned": assigned,
            "greedy_over_bounded": ratio,
            "outcomes": ended,
        },
        headline=(
            f"After {rounds} rounds the loads FLEX-MoE assigned vary by {assigned[FLEX].mean:.3f}, those of its greedy "
            f"control by {assigned[GREEDY].mean:.3f}"
            + (f", {ratio:.1f} times as much." if ratio is not None else ": bounded, they do not vary at all.")
        ),
        paragraph=(
            f"What was trained is most even under {even} ({last[even].mean:.2f}) and most uneven under {uneven} "
            f"({last[uneven].mean:.2f}). Numbers are coefficients of variation over all experts of all layers of how "
            "many clients have held, or trained, each expert so far. An expert that was assigned and that no token "
            "chose is held but not trained. Greedy is FLEX-MoE without bounds on loads. "
            f"Accuracies of the global model: {', '.join(f'{n} {interval(one.accuracy)}' for n, one in ended.items())}."
        ),
        figures=[
            Figure(
                caption="Variation of cumulative trained loads",
                html=legend(list(by_round), lines=True)
                + curves(
                    [
                        Curve(
                            name=name,
                            points=[(number + 1.0, one.mean) for number, one in enumerate(values)],
                            spread=[(one.low, one.high) for one in values],
                        )
                        for name, values in by_round.items()
                    ],
                    label="Coefficient of variation of cumulative loads by round",
                    across="round",
                    write=lambda value: f"{value:.2f}",
                    write_x=lambda number: f"{number:g}",
                ),
            )
        ],
        tables=[
            Table(
                title="After the last round",
                headings=["Strategy", "*Variation, trained", "*Variation, assigned", "*Global", "*Own"],
                rows=[
                    [
                        name,
                        f"{last[name].mean:.3f}",
                        f"{assigned[name].mean:.3f}" if name in assigned else MISSING,
                        interval(one.accuracy),
                        interval(one.own_accuracy),
                    ]
                    for name, one in ended.items()
                ],
                note=f"Means over {len(setting.seeds)} seeds; accuracies ± half of the 95 % interval.",
            )
        ],
    )


def variations(run: RunRecord) -> Sequence[float]:
    """Variation of the loads up to each round that trained."""
    trained = [report.selected for report in run.rounds if report.round > 0]
    return [variation(total) for total in np.cumsum(np.array(trained, dtype=np.float64), axis=0)]


def holders(run: RunRecord) -> FloatArray:
    """How many clients FLEX-MoE assigned each expert to over a run, [L, E]."""
    with continued(run) as federation:
        found: FloatArray = federation.strategy.state["holders"].astype(np.float64)
        return found


STUDY = Study(
    name="balance",
    title="How evenly experts are trained",
    shows="variation of the experts' loads: FLEX-MoE, its greedy control, HFedMoE, random",
    cost="10 runs of twice the rounds, about 6 minutes",
    config="study_balance.yaml",
    measure=measure,
    seeds=(0, 1),
)
