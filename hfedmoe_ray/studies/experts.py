"""How many experts a layer is made of, against accuracy and cost (figure of arXiv 2601.00583).

The share of experts a token is routed to and the share a client holds stay as configured, so that with `how: split`
every number of experts computes, holds and sends about the same number of parameters.
"""

from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.studies.outcomes import COST_HEADINGS, costs, interval, outcomes
from hfedmoe_ray.studies.plots import Curve, curves
from hfedmoe_ray.studies.runs import make_runs
from hfedmoe_ray.studies.study import Figure, Findings, Setting, Study, Table
from hfedmoe_ray.tracking.charts import legend
from hfedmoe_ray.tracking.formatting import percent, size

COUNTS = (4, 8, 16, 32)


def measure(setting: Setting) -> Findings:
    """Accuracy, bytes, memory and seconds of the configured strategy with every number of experts."""
    base = setting.experiment(setting.seeds[0])
    upcycle = base.model.upcycle
    if upcycle is None:
        raise ConfigError(
            "The study varies into how many experts a dense model is upcycled, but this model is a Mixture of Experts "
            "already. Give a configuration with `model.upcycle`, or leave CONFIG out."
        )
    variants = {
        str(count): [
            f"model.upcycle.experts={count}",
            f"model.upcycle.top_k={max(1, round(count * upcycle.top_k / upcycle.experts))}",
        ]
        for count in COUNTS
    }
    found = outcomes(make_runs(setting, variants))
    best = max(found, key=lambda name: found[name].accuracy.mean)
    few, many = str(COUNTS[0]), str(COUNTS[-1])
    slower = found[many].step_seconds / found[few].step_seconds
    return Findings(
        numbers={"outcomes": found, "top_k": {name: lines[1].partition("=")[2] for name, lines in variants.items()}},
        headline=(
            f"{best} experts a layer end highest ({percent(found[best].accuracy.mean)}); {many} take {slower:.1f} "
            f"times as long a step as {few}."
        ),
        paragraph=(
            f"From {few} to {many} experts, accuracy before training goes from "
            f"{percent(found[few].initial_accuracy.mean)} to {percent(found[many].initial_accuracy.mean)} and after it "
            f"from {percent(found[few].accuracy.mean)} to {percent(found[many].accuracy.mean)}; upload from "
            f"{size(found[few].bytes_up)} to {size(found[many].bytes_up)} a run. The strategy is {base.strategy.name}. "
            "Clients hold the same share of the experts throughout, and a token is routed to the same share, so what "
            "changes is how finely the budget can choose. Seconds were measured while runs shared this machine: read "
            "them as ratios."
        ),
        figures=[
            Figure(
                caption="Accuracy",
                html=legend(["global model, test set", "clients, own test data", "before training"], lines=True)
                + curves(
                    [
                        Curve(
                            name=name,
                            points=[(count, getattr(found[str(count)], field).mean) for count in COUNTS],
                            spread=[
                                (getattr(found[str(count)], field).low, getattr(found[str(count)], field).high)
                                for count in COUNTS
                            ],
                        )
                        for name, field in (
                            ("global model, test set", "accuracy"),
                            ("clients, own test data", "own_accuracy"),
                            ("before training", "initial_accuracy"),
                        )
                    ],
                    label="Accuracy by number of experts a layer",
                    across="experts a layer",
                    write=lambda share: f"{100 * share:.1f} %",
                    write_x=lambda count: f"{count:.0f}",
                    doubling=True,
                ),
            ),
            Figure(
                caption="Seconds of a client's steps in a round",
                html=curves(
                    [
                        Curve(
                            name="optimizer steps",
                            points=[(count, found[str(count)].step_seconds) for count in COUNTS],
                        )
                    ],
                    label="Seconds by number of experts a layer",
                    across="experts a layer",
                    write=lambda seconds: f"{seconds:.2f}",
                    write_x=lambda count: f"{count:.0f}",
                    doubling=True,
                ),
            ),
        ],
        tables=[
            Table(
                title="By number of experts",
                headings=["*Experts a layer", "*Global", "*Own", "*Before", *COST_HEADINGS],
                rows=[
                    [
                        name,
                        interval(one.accuracy),
                        interval(one.own_accuracy),
                        percent(one.initial_accuracy.mean),
                        *costs(one),
                    ]
                    for name, one in found.items()
                ],
                note=f"Mean ± half of the 95 % interval over {len(setting.seeds)} seeds.",
            )
        ],
    )


STUDY = Study(
    name="experts",
    title="Into how many experts",
    shows="accuracy, bytes, memory and time against the number of experts a layer",
    cost="8 runs, and 8 models to prepare, about 6 minutes",
    config="study_small.yaml",
    measure=measure,
    seeds=(0, 1),
)
