"""What averaging does to each client: its accuracy on its own data just before and just after (arXiv 2601.00583).

One more round is watched from where each run ended. Every client of the round is evaluated three times on its own test
split, holding the experts it trains with: as it received the model, as it trained it, as it gets it back.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from hfedmoe_ray.errors import TrainingError
from hfedmoe_ray.studies.continued import continued
from hfedmoe_ray.studies.outcomes import estimate, interval
from hfedmoe_ray.studies.plots import estimates, scatter
from hfedmoe_ray.studies.runs import make_runs
from hfedmoe_ray.studies.statistics import mean_of
from hfedmoe_ray.studies.study import Figure, Findings, Setting, Study, Table
from hfedmoe_ray.tracking.charts import legend
from hfedmoe_ray.tracking.formatting import percent
from hfedmoe_ray.tracking.record import RunRecord

STRATEGIES: dict[str, tuple[str, ...]] = {
    "hfedmoe": ("strategy=hfedmoe",),
    "hfedmoe, literal router": ("strategy=hfedmoe", "strategy.gate_weights=literal"),
    "random": ("strategy=random",),
    "fedavg": ("strategy=fedavg",),
}


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Accuracy of each client of one round on its own test split."""

    received: Mapping[int, float]
    trained: Mapping[int, float]
    aggregated: Mapping[int, float]


def measure(setting: Setting) -> Findings:
    """The three accuracies under every strategy."""
    found = make_runs(setting, STRATEGIES)
    watched: dict[str, list[Watched]] = {}
    for name, runs in found.items():
        for run, seed in zip(runs, setting.seeds, strict=True):
            setting.tell(f"a further round of {name}, seed {seed}")
            watched.setdefault(name, []).append(watch(run))
    means = {
        name: {stage: mean_of([float(np.mean([*getattr(one, stage).values()])) for one in rounds]) for stage in _STAGES}
        for name, rounds in watched.items()
    }
    changes = {
        name: [one.aggregated[client] - one.trained[client] for one in rounds for client in one.aggregated]
        for name, rounds in watched.items()
    }
    losers = {name: float(np.mean([change < 0 for change in values])) for name, values in changes.items()}
    costliest = min(changes, key=lambda name: float(np.mean(changes[name])))
    kindest = max(changes, key=lambda name: float(np.mean(changes[name])))
    sayings = "; ".join(
        f"under {name} training brings the round's clients from {percent(one['received'].mean)} to "
        f"{percent(one['trained'].mean)}, and averaging to {percent(one['aggregated'].mean)} "
        f"({percent(losers[name], 0)} of them lose by it)"
        for name, one in means.items()
    )
    return Findings(
        numbers={"clients": watched, "means": means, "share_that_loses": losers},
        headline=(
            f"Averaging changes a client's accuracy on its own data by {_points(changes[costliest])} points under "
            f"{costliest}, and by {_points(changes[kindest])} under {kindest}."
        ),
        paragraph=(
            f"On their own test data, {sayings}. A client is evaluated with the experts it holds in that round, the "
            "others represented as in training. A loss by averaging is what the clients' different needs cost each of "
            "them; the gain of the round as a whole is from received to aggregated."
        ),
        figures=[
            Figure(
                caption="Each client before and after averaging",
                html=legend(list(watched))
                + scatter(
                    {
                        name: [(one.trained[c], one.aggregated[c]) for one in rounds for c in one.aggregated]
                        for name, rounds in watched.items()
                    },
                    label="Accuracy on own test data after averaging against before, a point for each client",
                    across="as the client trained it",
                    upward="as it gets it back",
                    write=lambda share: f"{100 * share:.0f} %",
                ),
            ),
            Figure(
                caption="Mean of the round's clients",
                html=legend([_STAGES[stage] for stage in _STAGES])
                + estimates(
                    [
                        estimate(name if group == 1 else "", value, group)
                        for name, stages in means.items()
                        for group, value in enumerate(stages.values())
                    ],
                    label="Mean accuracy as received, trained and aggregated, by strategy",
                    write=lambda share: f"{100 * share:.1f} %",
                ),
            ),
        ],
        tables=[
            Table(
                title="Mean accuracy of the round's clients on their own test data",
                headings=["Strategy", *(f"*{stage.capitalize()}" for stage in _STAGES), "*Lose by averaging"],
                rows=[
                    [name, *(interval(value) for value in stages.values()), percent(losers[name], 0)]
                    for name, stages in means.items()
                ],
                note=f"Mean ± half of the 95 % interval over {len(setting.seeds)} seeds.",
            )
        ],
    )


_STAGES = {"received": "as received", "trained": "as trained", "aggregated": "as aggregated"}


def _points(changes: list[float]) -> str:
    """The mean change in percentage points, with its sign."""
    change = 100 * float(np.mean(changes))
    return f"{'−' if change < 0 else '+'}{abs(change):.1f}"


def watch(run: RunRecord) -> Watched:
    """One more round of a run, each client evaluated before training, after it, and after averaging."""
    from hfedmoe_ray.federation.evaluation import own_tasks, summarise
    from hfedmoe_ray.federation.validation import accept
    from hfedmoe_ray.types import ExpertPlan, PersonalWeights, Weights

    with continued(run) as federation:
        state, strategy, experiment = federation.state, federation.strategy, federation.experiment

        def accuracies(weights: Weights) -> Mapping[int, float]:
            federation.executor.publish(weights)
            tasks = own_tasks(experiment, number, strategy, weights, plans)
            return summarise(federation.executor.run(tasks, federation.tracker.event)).own

        number = state.round + 1
        cohort = federation.cohort(number)
        federation.profile(number, cohort)
        clients = [federation.client_info(client) for client in cohort]
        plans: dict[int, ExpertPlan] = strategy.plan(number, clients, state.profiles)
        received = accuracies(state.weights)
        results = federation.collector.collect([federation.task("train", number, c, plan) for c, plan in plans.items()])
        private = dict(state.weights.personal or {})
        for result in results:
            client = result.task.client
            if result.status != "ok":
                raise TrainingError(f"the watched round lost client {client}: {result.status} ({result.reason})")
            start = state.weights.seen_by(result.task.personal)
            update = accept(result, plans[client], start, experiment.wire, strategy.signals)
            own = private.get(client, PersonalWeights(shared={}, experts={}))
            # As if it kept what it trained: laid over what is published.
            private[client] = PersonalWeights(
                shared={**own.shared, **update.shared}, experts={**own.experts, **update.experts}
            )
        trained = accuracies(replace(state.weights, version=state.weights.version + 1, personal=private))
        federation.averaging.reduce(results, plans)
        return Watched(received=received, trained=trained, aggregated=accuracies(state.weights))


STUDY = Study(
    name="aggregation",
    title="What averaging does to each client",
    shows="each client's accuracy on its own data before and after aggregation",
    cost="12 runs and a round of each, about 5 minutes",
    config="study_small.yaml",
    measure=measure,
)
