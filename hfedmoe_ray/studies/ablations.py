"""HFedMoE without one of its parts at a time, and with other budgets: what each is worth."""

from hfedmoe_ray.studies.outcomes import COST_HEADINGS, accuracy_figures, by_seed, certain, costs, interval, outcomes
from hfedmoe_ray.studies.runs import make_runs
from hfedmoe_ray.studies.statistics import Mean
from hfedmoe_ray.studies.study import Findings, Setting, Study, Table
from hfedmoe_ray.tracking.formatting import percent

WHOLE = "hfedmoe"
_HFEDMOE = "strategy=hfedmoe"
PARTS: dict[str, tuple[str, ...]] = {
    WHOLE: (),
    "β = 0, no information": ("strategy.beta=0",),
    "λ = 0, specific only": ("strategy.lam=0",),
    "λ = 1, cumulative only": ("strategy.lam=1",),
    "literal router weights": ("strategy.gate_weights=literal",),
    "participation by usage": ("strategy.participation=usage",),
    "no exploration": ("strategy.explore=0",),
}
BUDGETS = (0.5, 2.0, 4.0)
"""Multiples of the configured budgets."""


def variants(setting: Setting) -> dict[str, list[str]]:
    """Overrides by name: the method, without each part, and with other budgets."""
    tiers = setting.experiment(setting.seeds[0], _HFEDMOE).clients.tiers
    found = {name: [_HFEDMOE, *overrides] for name, overrides in PARTS.items()}
    for factor in BUDGETS:
        shares = [min(1.0, factor * tier.experts) for tier in tiers]
        name = f"budget {percent(shares[0])}" if len(tiers) == 1 else f"budgets x {factor:g}"
        found[name] = [_HFEDMOE, *(f"clients.tiers.{tier}.experts={share}" for tier, share in enumerate(shares))]
    return found


def measure(setting: Setting) -> Findings:
    """Both accuracies of every variant, and its difference to the method seed by seed."""
    found = outcomes(make_runs(setting, variants(setting)))
    whole = found[WHOLE]
    differences = {
        name: {
            "accuracy": by_seed(one.accuracy, whole.accuracy),
            "own_accuracy": by_seed(one.own_accuracy, whole.own_accuracy),
        }
        for name, one in found.items()
        if name != WHOLE
    }
    moved = [
        f"{name} ({'+' if one['accuracy'].mean > 0 else '−'}{100 * abs(one['accuracy'].mean):.1f} points)"
        for name, one in differences.items()
        if certain(one["accuracy"])
    ]
    best = max(found, key=lambda name: found[name].accuracy.mean)
    worst = min(found, key=lambda name: found[name].accuracy.mean)
    seeds = len(setting.seeds)
    return Findings(
        numbers={"outcomes": found, "differences": differences},
        headline=(
            f"The method reaches {interval(whole.accuracy)}; of {len(found) - 1} changes to it, {len(moved)} moved the "
            "global model's accuracy beyond the interval."
        ),
        paragraph=(
            (f"These are {', '.join(moved)}. " if moved else "")
            + f"The highest mean is that of {best} ({percent(found[best].accuracy.mean)}), the lowest that of {worst} "
            f"({percent(found[worst].accuracy.mean)}). Differences are taken seed by seed, over {seeds} seeds, and "
            f"called beyond the interval where Student's 95 % interval leaves out zero; of {len(found) - 1} changes "
            "without any effect one in twenty would still be. Dashed: the method."
        ),
        figures=accuracy_figures(found, WHOLE),
        tables=[
            Table(
                title="Variants",
                headings=["Variant", "*Global", "*To hfedmoe", "*Own", "*To hfedmoe", *COST_HEADINGS],
                rows=[
                    [
                        name,
                        interval(one.accuracy),
                        _points(differences, name, "accuracy"),
                        interval(one.own_accuracy),
                        _points(differences, name, "own_accuracy"),
                        *costs(one),
                    ]
                    for name, one in found.items()
                ],
                note=f"Mean ± half of the 95 % interval over {seeds} seeds; differences in percentage points.",
            )
        ],
    )


def _points(differences: dict[str, dict[str, Mean]], name: str, what: str) -> str:
    if name not in differences:
        return ""
    one = differences[name][what]
    return f"{'−' if one.mean < 0 else '+'}{100 * abs(one.mean):.1f} ± {100 * (one.high - one.mean):.1f}"


STUDY = Study(
    name="ablations",
    title="What each part of HFedMoE is worth",
    shows="accuracy of HFedMoE without each of its parts, and with other budgets",
    cost="30 runs, about 9 minutes",
    config="study_small.yaml",
    measure=measure,
)
