"""How many clients train each expert, under the rules that choose experts (figure of arXiv 2601.00583).

Popularity of an expert: clients that took an optimizer step on it, mean over rounds. Legend: L layers, E experts.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from hfedmoe_ray.studies.plots import Curve, curves
from hfedmoe_ray.studies.runs import make_runs
from hfedmoe_ray.studies.statistics import mean_of
from hfedmoe_ray.studies.study import Figure, Findings, Setting, Study, Table
from hfedmoe_ray.tracking.charts import legend, scale
from hfedmoe_ray.tracking.formatting import percent
from hfedmoe_ray.tracking.maps import heat_map
from hfedmoe_ray.tracking.record import RunRecord
from hfedmoe_ray.types import FloatArray

RULES: dict[str, tuple[str, ...]] = {
    "hfedmoe, each batch": ("strategy=hfedmoe", "strategy.resident=all"),
    "hfedmoe, residents": ("strategy=hfedmoe",),
    "hfedmoe, coverage": ("strategy=hfedmoe", "strategy.coverage=0.5"),
    "random, residents": ("strategy=random",),
}


def measure(setting: Setting) -> Findings:
    """Popularity of every expert under every rule, and how even it is."""
    found = make_runs(setting, RULES)
    measured = {name: [popularity(run) for run in runs] for name, runs in found.items()}
    uneven_by = {name: mean_of([variation(grid) for grid in grids]) for name, grids in measured.items()}
    never = {name: mean_of([float((grid == 0).mean()) for grid in grids]) for name, grids in measured.items()}
    upper = {name: mean_of([upper_tenth(grid) for grid in grids]) for name, grids in measured.items()}
    cohort = setting.experiment(setting.seeds[0]).clients.cohort
    uneven = max(measured, key=lambda name: uneven_by[name].mean)
    even = min(measured, key=lambda name: uneven_by[name].mean)
    sayings = "; ".join(
        f"{name}: {percent(never[name].mean)} of the experts never trained, the most popular tenth got "
        f"{percent(upper[name].mean)} of all trainings"
        for name in measured
    )
    return Findings(
        numbers={"clients_by_expert": measured, "variation": uneven_by, "never_trained": never, "upper_tenth": upper},
        headline=(
            f"Popularity is most uneven under {uneven} (coefficient of variation "
            f"{uneven_by[uneven].mean:.2f}) and most even under {even} "
            f"({uneven_by[even].mean:.2f})."
        ),
        paragraph=(
            f"{sayings}. Counted are clients that took an optimizer step on the expert, mean over rounds, of {cohort} "
            f"clients a round. Choosing for each batch (the paper's setting) counts every expert that any batch of the "
            f"round chose, so its total is higher than the budget of one batch. The maps show seed {setting.seeds[0]}."
        ),
        figures=[_ranked(measured), *(_map(name, grids[0], cohort) for name, grids in measured.items())],
        tables=[
            Table(
                title="Evenness",
                headings=["Rule", "*Clients an expert", "*Variation", "*Never trained", "*Upper tenth's share"],
                rows=[
                    [
                        name,
                        f"{np.mean(grids):.2f}",
                        f"{uneven_by[name].mean:.2f}",
                        percent(never[name].mean),
                        percent(upper[name].mean),
                    ]
                    for name, grids in measured.items()
                ],
                note=f"Means over {len(setting.seeds)} seeds. Variation: standard deviation over mean, all experts of "
                "all layers; 0 is even.",
            )
        ],
    )


def popularity(run: RunRecord) -> FloatArray:
    """Clients that trained each expert, mean over the rounds that trained, [L, E]."""
    grid: FloatArray = np.mean([report.selected for report in run.rounds if report.round > 0], axis=0)
    return grid


def variation(grid: FloatArray) -> float:
    """Standard deviation over mean."""
    return float(grid.std() / grid.mean())


def upper_tenth(grid: FloatArray) -> float:
    """Share of all trainings that fell to the most popular tenth of the experts (at least one)."""
    ranked = np.sort(grid, axis=None)[::-1]
    return float(ranked[: max(1, round(len(ranked) / 10))].sum() / ranked.sum())


def _ranked(measured: Mapping[str, Sequence[FloatArray]]) -> Figure:
    lines = []
    for name, grids in measured.items():
        ranked = np.mean([np.sort(grid, axis=None)[::-1] for grid in grids], axis=0)
        lines.append(Curve(name=name, points=[(rank + 1.0, float(value)) for rank, value in enumerate(ranked)]))
    image = curves(
        lines,
        label="Clients that train an expert, by its rank",
        across="experts by rank",
        write=lambda count: f"{count:.3g}",
        write_x=lambda rank: f"{rank:.0f}",
    )
    names = [one.name for one in lines]
    return Figure(caption="Clients a round, most popular expert first", html=legend(names, lines=True) + image)


def _map(name: str, grid: FloatArray, cohort: int) -> Figure:
    image = heat_map(
        grid.tolist(),
        label=f"Clients that train each expert, {name}",
        rows=[f"layer {layer}" for layer in range(len(grid))],
        columns="expert",
        peak=float(cohort),
        describe=lambda layer, expert: f"layer {layer}, expert {expert}: {grid[layer, expert]:.2f} clients",
        write=lambda count: f"{count:.1f}",
    )
    return Figure(caption=f"{name}: clients a round", html=scale("few", f"all {cohort}") + image)


STUDY = Study(
    name="popularity",
    title="How many clients train each expert",
    shows="clients that train each expert, by layer: the paper's rule, residents, coverage, random",
    cost="12 runs, about 4 minutes",
    config="study_small.yaml",
    measure=measure,
)
