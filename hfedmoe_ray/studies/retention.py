"""What is left of the accuracy when clients' data differ: accuracy non-IID / IID (after arXiv 2508.18663)."""

from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.studies.outcomes import estimate, interval, outcomes
from hfedmoe_ray.studies.plots import estimates
from hfedmoe_ray.studies.runs import make_runs
from hfedmoe_ray.studies.statistics import mean_of
from hfedmoe_ray.studies.study import Figure, Findings, Setting, Study, Table
from hfedmoe_ray.tracking.formatting import percent

STRATEGIES = ("hfedmoe", "random", "flex_moe", "fft_moe", "fedavg")


def measure(setting: Setting) -> Findings:
    """Accuracy of every strategy on the configured partition and on an even one, and their ratio seed by seed."""
    how = setting.experiment(setting.seeds[0]).data.partition
    if how.how == "iid":
        raise ConfigError(
            f"The study compares the configured partition with an even one, but {setting.config} has "
            "`data.partition.how: iid` itself. Write e.g. data.partition.how=dirichlet data.partition.alpha=0.1."
        )
    skew = f"Dirichlet {how.alpha:g}" if how.how == "dirichlet" else how.how
    variants = {
        f"{name}, {kind}": [f"strategy={name}", *overrides]
        for name in STRATEGIES
        for kind, overrides in (("skewed", ()), ("even", ("data.partition={how: iid}",)))
    }
    found = outcomes(make_runs(setting, variants))
    kept = {
        name: mean_of(
            [
                skewed / even
                for skewed, even in zip(
                    found[f"{name}, skewed"].accuracy.values, found[f"{name}, even"].accuracy.values, strict=True
                )
            ]
        )
        for name in STRATEGIES
    }
    best = max(kept, key=lambda name: kept[name].mean)
    worst = min(kept, key=lambda name: kept[name].mean)
    start = found[f"{best}, skewed"].initial_accuracy.mean
    return Findings(
        numbers={"outcomes": found, "retention": kept},
        headline=(
            f"Under {skew}, {best} retains {percent(kept[best].mean)} of its accuracy on evenly dealt data, {worst} "
            f"{percent(kept[worst].mean)}."
        ),
        paragraph=(
            f"Retention is the accuracy of the global model with the configured partition ({skew}) over that with the "
            "same examples dealt evenly, seed by seed; 100 % means that skew costs nothing. Before any training the "
            f"model is at {percent(start)}: what the task head knows by then is retained by every strategy, so a high "
            "retention alone is no merit. Compare the accuracies themselves in the table. All train the same model; on "
            "the adapters that FFT-MoE is meant for, give configs/fft_moe_20news.yaml."
        ),
        figures=[
            Figure(
                caption="Accuracy retained under skew",
                html=estimates(
                    [estimate(name, value, group) for group, (name, value) in enumerate(kept.items())],
                    label="Accuracy on skewed data over accuracy on even data, by strategy",
                    write=lambda share: f"{100 * share:.0f} %",
                    reference=1.0,
                ),
            )
        ],
        tables=[
            Table(
                title="Accuracy of the global model",
                headings=["Strategy", f"*{skew}", "*Even", "*Retention"],
                rows=[
                    [
                        name,
                        interval(found[f"{name}, skewed"].accuracy),
                        interval(found[f"{name}, even"].accuracy),
                        interval(kept[name]),
                    ]
                    for name in STRATEGIES
                ],
                note=f"Mean ± half of the 95 % interval over {len(setting.seeds)} seeds.",
            )
        ],
    )


STUDY = Study(
    name="retention",
    title="What skewed data leave of the accuracy",
    shows="accuracy non-IID over IID of each strategy",
    cost="30 runs, about 9 minutes",
    config="study_small.yaml",
    measure=measure,
)
