"""What the choice of experts tells of a client's topics, and what hiding it costs (ours).

The attack (`inference`) names a client's most frequent class, from the usage vector it sends and from the experts it
holds. Each defence is attacked by who knows it, and the runs train with its answers, on the same draws.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from hfedmoe_ray import budget
from hfedmoe_ray.config.privacy import Selection
from hfedmoe_ray.config.strategies import HFedMoE as Options
from hfedmoe_ray.context import RunContext
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.federation.cohort import select_cohort
from hfedmoe_ray.strategies import build_strategy
from hfedmoe_ray.strategies.hfedmoe import HFedMoE
from hfedmoe_ray.strategies.scores import mask, top_experts
from hfedmoe_ray.studies.inference import Victims, baseline, success, victims
from hfedmoe_ray.studies.outcomes import interval
from hfedmoe_ray.studies.plots import Estimate, estimates
from hfedmoe_ray.studies.runs import make_runs
from hfedmoe_ray.studies.statistics import Mean, mean_of
from hfedmoe_ray.studies.study import Figure, Findings, Setting, Study, Table
from hfedmoe_ray.tracking.formatting import percent
from hfedmoe_ray.trust.selection import answer
from hfedmoe_ray.types import FloatArray, RoutingProfile

SHADOWS = 1000
NOTHING = "nothing"
CONTRIBUTORS = (2, 3, 5)
"""k: experts that fewer of a round's cohort hold are hidden; in the runs, not averaged."""
DEFENCES: dict[str, tuple[str, float]] = {
    "usage, ε 100": ("usage", 100.0),
    "usage, ε 1000": ("usage", 1000.0),
    "gumbel, ε 100": ("gumbel", 100.0),
    "response, ε 4": ("response", 4.0),
    "response, ε 16": ("response", 16.0),
    "response, ε 32": ("response", 32.0),
}
"""Mechanism and epsilon of one answer, by name."""


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """What the attack makes of a defence, and what the model makes of it."""

    vector: Mean | None
    """Success by what the client sends; None where that is its plan."""
    plan: Mean
    """Success by the experts it holds, as far as they are seen."""
    accuracy: Mean
    """Of the global model after the last round."""


def measure(setting: Setting) -> Findings:
    """Attack and accuracy under every defence."""
    from hfedmoe_ray.prepare import prepare_run

    withheld = {_contributors(least): (f"robust.min_contributors={least}",) for least in CONTRIBUTORS}
    hidden = {name: _overrides(*how) for name, how in DEFENCES.items()}
    runs = make_runs(setting, {NOTHING: (), **withheld, **hidden})
    accuracies = {name: mean_of([run.summary["accuracy"] for run in made]) for name, made in runs.items()}
    vectors: dict[str, list[float]] = {}
    plans: dict[str, list[float]] = {}
    guesses = []
    for seed in setting.seeds:
        setting.tell(f"attack, seed {seed}")
        context = prepare_run(setting.experiment(seed), setting.output)
        found = victims(context, SHADOWS)
        guesses.append(baseline(found))
        views = Views(context)
        defences = {NOTHING: None, **{name: _selection(*how) for name, how in DEFENCES.items()}}
        for name, options in defences.items():
            if options is None or options.how == "usage":
                vectors.setdefault(name, []).append(success(found, partial(views.vector, options)))
            plans.setdefault(name, []).append(success(found, partial(views.plan, options)))
            if options is None:
                for least in CONTRIBUTORS:
                    plans.setdefault(_contributors(least), []).append(views.among_contributors(found, least))
    attacked = {
        name: Attacked(
            vector=mean_of(vectors[name]) if name in vectors else None,
            plan=mean_of(values),
            accuracy=accuracies[name],
        )
        for name, values in plans.items()
    }
    return _findings(setting, attacked, mean_of(guesses))


def _contributors(least: int) -> str:
    return f"k-contributors, k = {least}"


class Views:
    """What is seen of a client, under the rules of a run."""

    def __init__(self, context: RunContext) -> None:
        """Takes note of the run.

        Raises:
            ConfigError: Its clients do not choose residents by their profiles, or have different budgets.
        """
        experiment, shape = context.experiment, context.model.shape
        if not isinstance(experiment.strategy, Options) or len(experiment.clients.tiers) != 1:
            raise ConfigError(
                "the study asks what a choice of experts tells: write `strategy: hfedmoe`, and one tier, so that all "
                "clients choose equally many"
            )
        strategy = build_strategy(experiment.strategy, shape, experiment.seed)
        assert isinstance(strategy, HFedMoE)
        self._strategy = strategy
        self._scope = experiment.strategy.scope
        self._experiment = experiment
        self._shape = (shape.layers, shape.experts)
        self._residents, _ = budget.expert_counts(experiment.clients.tiers[0], shape)

    def vector(self, options: Selection | None, profile: RoutingProfile, client: int) -> FloatArray:
        """The usage that a client sends, under a defence or none, [L E]."""
        return self._sent(options, profile, client).usage.ravel()

    def plan(self, options: Selection | None, profile: RoutingProfile, client: int) -> FloatArray:
        """Which experts it holds: 1.0 for those, [L E]."""
        score = self._strategy.score(self._sent(options, profile, client))
        held = top_experts(score, np.ones(self._shape, dtype=bool), self._residents, self._scope)
        return mask(self._shape, held).astype(np.float64).ravel()

    def _sent(self, options: Selection | None, profile: RoutingProfile, client: int) -> RoutingProfile:
        if options is None:
            return profile
        score = self._strategy.score(profile)
        return answer(options, profile, score, self._residents, self._scope, client=client)

    def among_contributors(self, found: Victims, least: int) -> float:
        """Success by plans of which experts that fewer than `least` of a cohort hold are hidden.

        A client is seen in one cohort: clients in those of the run that they are drawn into, one after the other until
        all were; a shadow client among others of its kind.
        """
        clients = [self.plan(None, one.profile, 0) for one in found.clients]
        shadows = [self.plan(None, one.profile, 0) for one in found.shadows]
        size = self._experiment.clients.cohort
        seen: dict[int, FloatArray] = {}
        round = 0
        while len(seen) < len(clients):
            round += 1
            cohort = select_cohort(self._experiment.clients, self._experiment.seed, round, [1] * len(clients))
            shown = _shown([clients[c] for c in cohort], least)
            seen |= {client: view for client, view in zip(cohort, shown, strict=True) if client not in seen}
        for start in range(0, len(shadows), size):
            cohort_of = range(start, min(start + size, len(shadows)))
            shown = _shown([shadows[c] for c in cohort_of], least)
            seen |= {10**6 + number: view for number, view in zip(cohort_of, shown, strict=True)}
        return success(found, lambda _, number: seen[number])


def _shown(plans: Sequence[FloatArray], least: int) -> list[FloatArray]:
    """The plans of a cohort without the experts that fewer than `least` of it hold."""
    enough = np.sum(plans, axis=0) >= least
    return [plan * enough for plan in plans]


def _selection(how: str, epsilon: float) -> Selection:
    """A defence whose draws are the same in the attack and in the runs."""
    return Selection.model_validate({"how": how, "epsilon": epsilon, "noise_seed": 0})


def _overrides(how: str, epsilon: float) -> list[str]:
    options = _selection(how, epsilon).model_dump(mode="json", exclude_defaults=True)
    return [f"privacy.selection.{key}={value}" for key, value in options.items()]


def _findings(setting: Setting, attacked: Mapping[str, Attacked], guess: Mean) -> Findings:
    open_ = attacked[NOTHING]
    assert open_.vector is not None
    experiment = setting.experiment(setting.seeds[0])
    clients, rounds = experiment.clients, experiment.rounds
    private = {name: one for name, one in attacked.items() if name.startswith("response")}
    words = "; ".join(f"{name}: {percent(one.plan.mean)}" for name, one in private.items())
    return Findings(
        numbers={"attacked": attacked, "majority_class": guess},
        headline=(
            f"From its usage vector the server names a client's dominant class in {percent(open_.vector.mean)} of all "
            f"cases, from the experts it holds in {percent(open_.plan.mean)}; the most frequent class is right in "
            f"{percent(guess.mean)}."
        ),
        paragraph=(
            f"From experts held by randomised response over sets: {words}. Usage and choices are those of the "
            f"model before training; {clients.count} clients and {SHADOWS} shadow clients a seed, which the attacker "
            "deals from the global test split as the clients were dealt, and puts through the same defence. Epsilon is "
            "that of a client's one answer, whatever its data were. k-contributors hides experts that fewer than k of "
            "a round's cohort hold, if the server itself is kept from seeing them; its runs leave experts unchanged "
            f"that fewer than k have trained. Accuracy is that after {rounds} rounds. The attack does not look at the "
            "trained weights, which tell more: see the page on privacy."
        ),
        figures=[
            _figure(
                "Dominant class named from what the server sees: usage where it is sent, else experts held",
                {name: one.plan if one.vector is None else one.vector for name, one in attacked.items()},
                guess.mean,
            ),
            _figure(
                "Accuracy of the global model",
                {name: one.accuracy for name, one in attacked.items()},
                None,
            ),
        ],
        tables=[
            Table(
                title="Attack and accuracy",
                headings=["Defence", "*Named by what is sent", "*Named by experts held", "*Accuracy"],
                rows=[
                    [
                        name,
                        "as by experts held" if one.vector is None else interval(one.vector),
                        interval(one.plan),
                        interval(one.accuracy),
                    ]
                    for name, one in attacked.items()
                ],
                note=f"Means over {len(setting.seeds)} seeds with 95 % intervals. Naming the class that is dominant "
                f"most often: {interval(guess)}. One seed asks {clients.count} clients, so a success of 10 % in all "
                f"has a standard error of {percent((0.09 / clients.count / len(setting.seeds)) ** 0.5)}.",
            )
        ],
    )


def _figure(caption: str, found: Mapping[str, Mean], reference: float | None) -> Figure:
    rows = [
        Estimate(name=name, mean=one.mean, low=one.low, high=one.high, values=one.values, group=int(name != NOTHING))
        for name, one in found.items()
    ]
    image = estimates(rows, label=caption, write=lambda share: f"{100 * share:.0f} %", reference=reference)
    return Figure(caption=caption, html=image)


STUDY = Study(
    name="selection_privacy",
    title="What the choice of experts tells of a client",
    shows="an attack on a client's dominant class by its usage and experts, with and without defences; what they cost",
    cost="20 runs of about a minute",
    config="study_selection.yaml",
    measure=measure,
    seeds=(0, 1),
)
