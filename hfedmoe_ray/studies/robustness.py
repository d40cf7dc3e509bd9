"""What hostile clients do to the global model, and what each robust rule is worth against them.

A fifth of the clients attacks in every round. `sign_flip` wants to ruin the model; `backdoor` wants it to stay good,
and to give one label to whatever carries a trigger. Every rule is also run without an attack: a defence has a price.
"""

from collections.abc import Mapping, Sequence

from hfedmoe_ray.studies.outcomes import by_seed, interval
from hfedmoe_ray.studies.plots import grouped_bars
from hfedmoe_ray.studies.runs import make_runs
from hfedmoe_ray.studies.statistics import Mean, mean_of
from hfedmoe_ray.studies.study import Figure, Findings, Setting, Study, Table
from hfedmoe_ray.tracking.charts import legend
from hfedmoe_ray.tracking.formatting import percent
from hfedmoe_ray.tracking.record import RunRecord

SHARE = 0.2
"""Of the clients, hostile."""
NONE, FLIP, DOOR = "no attack", "sign flip", "backdoor"
ATTACKS: Mapping[str, Sequence[str]] = {
    NONE: (),
    FLIP: ("attack.kind=sign_flip", f"attack.share={SHARE}"),
    DOOR: (
        "attack.kind=backdoor",
        f"attack.share={SHARE}",
        'attack.trigger="cf mn"',
        "attack.target=0",
        "attack.scale=3",
    ),
}
PLAIN = "mean"
_CLIP = "robust.clip_median=1"
_BOUNDS = (_CLIP, "robust.min_contributors=3")
DEFENCES: Mapping[str, Sequence[str]] = {
    PLAIN: (),
    "mean, clipped": (_CLIP,),
    "median": (*_BOUNDS, "robust.rule=median"),
    "trimmed mean": (*_BOUNDS, "robust.rule=trimmed_mean"),
    "krum": (*_BOUNDS, "robust.rule=krum"),
    "multi-krum": (*_BOUNDS, "robust.rule=multi_krum"),
    "geometric median": (*_BOUNDS, "robust.rule=geometric_median"),
}
"""All but the plain mean bound every change by the median of the round's, and the rules leave experts of fewer than
three contributors as they are: of two, no rule can tell the hostile one."""
_WITHIN = 0.03
"""A rule holds that ends so close to the run without attack or defence."""


def measure(setting: Setting) -> Findings:
    """Accuracy and backdoor success of every defence under every attack."""
    last = setting.experiment(setting.seeds[0]).rounds  # rounds between are of no interest here
    variants = {
        f"{defence}; {attack}": [*against, *hostile, "evaluate.own=never", f"evaluate.every={last}"]
        for defence, against in DEFENCES.items()
        for attack, hostile in ATTACKS.items()
    }
    runs = make_runs(setting, variants)
    found = {
        defence: {attack: runs[f"{defence}; {attack}"] for attack in ATTACKS} for defence in DEFENCES
    }  # defence -> attack -> a run per seed
    accuracy = {defence: {attack: _accuracy(some) for attack, some in by.items()} for defence, by in found.items()}
    opened = {
        defence: mean_of([float(run.summary["backdoor_success"]) for run in by[DOOR]]) for defence, by in found.items()
    }
    clean = accuracy[PLAIN][NONE]
    lost = {defence: by_seed(by[FLIP], clean) for defence, by in accuracy.items()}
    price = {defence: by_seed(by[NONE], clean) for defence, by in accuracy.items()}
    holding = [defence for defence in DEFENCES if defence != PLAIN and lost[defence].mean >= -_WITHIN]
    shut = min((defence for defence in DEFENCES), key=lambda defence: opened[defence].mean)
    return Findings(
        numbers={
            "accuracy": accuracy,
            "backdoor_success": opened,
            "lost_to_sign_flip": lost,
            "price": price,
            "share": SHARE,
        },
        headline=(
            f"With {percent(SHARE, 0)} sign-flipping clients the mean ends at {percent(accuracy[PLAIN][FLIP].mean)} "
            f"instead of {percent(clean.mean)}; of {len(DEFENCES) - 1} defences {len(holding)} stay within "
            f"{100 * _WITHIN:.0f} points of that."
        ),
        paragraph=(
            f"Within {100 * _WITHIN:.0f} points: {', '.join(holding) or 'none'}. A backdoor is opened for "
            f"{percent(opened[PLAIN].mean)} of the triggered texts by the mean and for {percent(opened[shut].mean)} by "
            f"{shut}, which does best. Hostile clients change nothing but what they train on and send; they do not "
            "know the defence."
        ),
        figures=[
            _figure(
                "Accuracy of the global model",
                {name: {k: v.mean for k, v in by.items()} for name, by in accuracy.items()},
            ),
            _figure("Backdoor success", {name: {DOOR: value.mean} for name, value in opened.items()}),
        ],
        tables=[
            Table(
                title="Accuracy by defence",
                headings=[
                    "Defence",
                    *(f"*{attack.capitalize()}" for attack in ATTACKS),
                    "*Backdoor success",
                    "*Price without attack",
                    "*Lost to sign flip",
                ],
                rows=[
                    [
                        name,
                        *(interval(accuracy[name][attack]) for attack in ATTACKS),
                        interval(opened[name]),
                        _points(price[name]),
                        _points(lost[name]),
                    ]
                    for name in DEFENCES
                ],
                note=f"Mean ± half of the 95 % interval over seeds ({len(setting.seeds)}), after the last round. The "
                "last two columns are differences from the mean without an attack, seed by seed, in points.",
            )
        ],
    )


def _accuracy(runs: Sequence[RunRecord]) -> Mean:
    return mean_of([float(run.summary["accuracy"]) for run in runs])


def _points(difference: Mean) -> str:
    half = 100 * (difference.high - difference.mean)
    return f"{100 * difference.mean:+.1f}" + (f" ± {half:.1f}" if len(difference.values) > 1 else "")


def _figure(caption: str, rows: Mapping[str, Mapping[str, float]]) -> Figure:
    names = list(next(iter(rows.values())))
    bars = grouped_bars(rows, label=f"{caption} by defence", write=lambda share: f"{100 * share:.1f} %")
    return Figure(caption=caption, html=(legend(names) if len(names) > 1 else "") + bars)


STUDY = Study(
    name="robustness",
    title="Hostile clients and robust rules",
    shows="accuracy and backdoor success under attack, by robust rule",
    cost="63 runs of the quickstart",
    config="quickstart.yaml",
    measure=measure,
)
