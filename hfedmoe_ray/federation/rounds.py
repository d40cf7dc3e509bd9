"""The round loop: plan, train, reduce, prove, evaluate, checkpoint, report.

Reads like the algorithm: `Federation.train_round` is one round. Where clients run is the executor's business, what
they hold the strategy's, and who is told the tracker's. A round may be evaluated while the one after it trains
(`federation.evaluator`): then its checkpoint says that this is still due, and its report comes before that of the next.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from typing import Any

from hfedmoe_ray import budget
from hfedmoe_ray.context import RunContext
from hfedmoe_ray.federation import reporting
from hfedmoe_ray.federation.ahead import meanwhile
from hfedmoe_ray.federation.averaging import Averaged, Averaging
from hfedmoe_ray.federation.checkpoint import load_checkpoint, run_identity, save_checkpoint
from hfedmoe_ray.federation.clock import Clock
from hfedmoe_ray.federation.cohort import select_cohort
from hfedmoe_ray.federation.collecting import Collector
from hfedmoe_ray.federation.demotion import Ladder
from hfedmoe_ray.federation.dropout import without_dropouts
from hfedmoe_ray.federation.evaluation import Evaluation
from hfedmoe_ray.federation.evaluator import Evaluator
from hfedmoe_ray.federation.executor import Executor
from hfedmoe_ray.federation.phases import Phases
from hfedmoe_ray.federation.secure import SecureAggregation
from hfedmoe_ray.federation.state import FederationState
from hfedmoe_ray.federation.stream import Stream
from hfedmoe_ray.moe.prepare import head_parameters, initial_weights, router_layers
from hfedmoe_ray.records import ClientRecord, RoundReport
from hfedmoe_ray.strategies import build_strategy
from hfedmoe_ray.strategies.robust import class_means, mean_outputs
from hfedmoe_ray.strategies.scores import uniform_plan
from hfedmoe_ray.tracking.tracker import Tracker
from hfedmoe_ray.trust import accounting, attacks
from hfedmoe_ray.trust.central import CentralPrivacy
from hfedmoe_ray.trust.redaction import as_promised
from hfedmoe_ray.types import (
    ClientInfo,
    ClientTask,
    ExpertPlan,
    Role,
    TaskKind,
)


def run_experiment(
    context: RunContext,
    executor: Executor,
    tracker: Tracker,
    *,
    resume: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Runs an experiment, or what is left of it.

    Args:
        context: The prepared run.
        executor: Runs the clients.
        tracker: Is told what happens.
        resume: Continue from the run's last checkpoint.
        should_stop: Asked between rounds; True ends the run after a checkpoint, to be resumed.

    Returns:
        The summary (the keys of summary.json), with status "finished" or "stopped".

    Raises:
        HFedMoEError: The run cannot go on; the tracker has been given a summary with status "failed" and the error.
    """
    kind: type[Federation] = Federation
    tracker = as_promised(context.experiment, tracker)
    if context.experiment.asynchronous is not None:
        from hfedmoe_ray.federation.asynchronous import AsynchronousFederation  # it builds on this module

        kind = AsynchronousFederation
    federation = kind(context, executor, tracker, resume=resume)
    tracker.start(context.experiment.model_dump(mode="json"), federation.facts())
    try:
        finished = federation.run(should_stop)
    except KeyboardInterrupt:
        tracker.finish(federation.summary("stopped"))
        raise
    except BaseException as error:
        tracker.finish(federation.summary("failed") | {"error": str(error) or type(error).__name__})
        raise
    summary = federation.summary("finished" if finished else "stopped")
    tracker.finish(summary)
    return summary


class Federation:
    """A server: the state of the global model and the steps of a round."""

    def __init__(self, context: RunContext, executor: Executor, tracker: Tracker, *, resume: bool) -> None:
        """Starts from the prepared model, or from the last checkpoint."""
        self.context = context
        self.experiment = context.experiment
        self.executor = Stream(executor, tracker.event)
        self.tracker = tracker
        self.strategy = build_strategy(
            self.experiment.strategy, context.model.shape, self.experiment.seed, self.experiment.rules
        )
        # Once: a run may have very many clients, and a round asks few of them.
        self.tiers = budget.tier_of(self.experiment.clients)
        self.budgets = {
            tier.name: budget.expert_counts(tier, context.model.shape) for tier in self.experiment.clients.tiers
        }
        # One process that does everything has no client's memory to tell.
        self.predicted_mib = (
            reporting.predicted_memory(context, gpus=executor.has_gpus) if executor.runs_elsewhere else {}
        )
        self.examples = tuple(map(sum, context.data.counts))
        self.checkpoints = context.run_dir / "checkpoints"
        self.identity = run_identity(context)
        self._phase = Phases()
        self.clock = Clock(self.experiment, context.model.shape, self.tiers)
        if resume:
            self.state = load_checkpoint(self.checkpoints, self.identity)
        else:
            model = self.experiment.model
            weights = initial_weights(context.model, model.trainable, model.lora, self.experiment.seed)
            self.state = FederationState(weights=weights)
        self.strategy.state = self.state.strategy
        self.strategy.report = tracker.event
        self.resumed_from = self.state.round if resume else None
        central = self.experiment.privacy.central
        self.central: CentralPrivacy | None = None
        if central is not None and central.active:
            self.central = CentralPrivacy(self.experiment, self.checkpoints, rounds=self.resumed_from)
        accounting.check_examples(self.experiment, self.examples)
        attacks.check_names(context)
        self.ladder = Ladder(
            self.experiment, self.executor, self.strategy, self.state, tiers=self.tiers, client_info=self.client_info
        )
        self.evaluator = Evaluator(
            self.experiment,
            self.executor,
            self.strategy,
            self.state,
            ladder=self.ladder,
            client_info=self.client_info,
            notify=tracker.event,
        )
        self.collector = Collector(
            self.experiment,
            self.ladder,
            self.strategy,
            self.tiers,
            dealt=self.examples,
            clock=self.clock,
            notify=tracker.event,
        )
        routers = router_layers(context.model)
        self.secure: SecureAggregation | None = None
        if self.experiment.secure is not None:
            self.secure = SecureAggregation(
                self.experiment,
                self.strategy,
                self.state,
                collector=self.collector,
                router_layers=routers,
                make_task=self.task,
                notify=tracker.event,
            )
        self.averaging = Averaging(
            self.experiment,
            self.strategy,
            self.state,
            collector=self.collector,
            router_layers=routers,
            central=self.central,
            secure=self.secure,
        )

    def run(self, should_stop: Callable[[], bool]) -> bool:
        """Runs the remaining rounds; returns whether all are done."""
        with closing(self.executor):
            self.executor.publish(self.state.weights)
            if self.state.unmeasured is not None:
                self.evaluator.begin(self.state.round)
            if self.state.round < 0:
                self.profile_round()
            while self.state.round < self.experiment.rounds and not should_stop():
                self.train_round(self.state.round + 1)
            self.report_last()
        return self.state.round >= self.experiment.rounds

    # ------------------------------------------------------------------------------------------------ the rounds

    def profile_round(self) -> None:
        """Round 0: routing profiles of the first cohort, and the accuracy before any training."""
        # Where the head starts at class means everyone is asked, once: every class should have one. Where nothing is
        # waited for, nobody can be profiled later.
        everyone = self.experiment.model.head == "prototypes" or self.experiment.asynchronous is not None
        cohort = range(self.experiment.clients.count) if everyone else self.cohort(1)
        started = self._begin(0, len(cohort))
        with self._phase("profile"):
            records = self.profile(0, cohort)
        averaged = Averaged(records=records, updates={}, participation=None)
        self._end(0, started, averaged, simulated=self.clock.elapsed(records))

    def train_round(self, round: int) -> None:
        """One round of federated training."""
        cohort = self.cohort(round)
        started = self._begin(round, len(cohort))
        with self._phase("profile"):
            profiled = self.profile(round, cohort)
            unprofiled = [record for record in profiled if record.status != "ok"]
        clients = [self.client_info(c) for c in cohort if c not in {record.client for record in unprofiled}]
        with self._phase("plan"):
            self.strategy.study(self.state.weights)
            plans = self.strategy.plan(round, clients, self.state.profiles)
        lost: list[ClientRecord] = []
        if self.secure is not None:
            with self._phase("agree"):
                plans, lost = self.secure.agree(round, plans)
        with self._phase("train"):
            tasks = [self.task("train", round, client, plan) for client, plan in plans.items()]
            # Of a cohort that is private everybody counts: it may be larger than its mean.
            wanted = self.experiment.clients.cohort if self.central is None else None
            results = self.collector.collect(tasks, wanted=wanted)
            self._phase.move(self.collector.waited, of="train", to="wait")
            plans |= {result.task.client: result.task.plan for result in results}  # fewer experts, where demoted
            results = without_dropouts(results, self.experiment.clients.failure_rate)
        with self._profiled_ahead(round + 1) as ahead:
            with self._phase("reduce"):
                averaged = self.averaging.reduce(results, plans)
            with self._phase("publish"):
                self.executor.publish(self.state.weights)
        simulated = self.clock.elapsed(profiled, averaged.records, ahead)
        averaged = replace(averaged, records=[*unprofiled, *lost, *averaged.records])
        self._end(round, started, averaged, simulated=simulated, ahead=ahead)

    def profile(self, round: int, cohort: Sequence[int]) -> list[ClientRecord]:
        """Profiles those of a cohort that have no profile yet, in one forward-only pass over a sample of their data.

        Returns a record per client profiled; where it is not "ok" the client cannot take part in this round.
        """
        starts_head = round == 0 and self.experiment.model.head == "prototypes"
        if not self.strategy.needs_profile and not starts_head:
            return []
        form = "exact" if starts_head else self.strategy.profiles_as
        plan = uniform_plan(self.strategy.shape, Role.FROZEN, frozen_as=form)
        newcomers = [client for client in cohort if client not in self.state.profiles]
        tasks = [self.task("profile", round, client, plan) for client in newcomers]
        results = self.collector.collect(tasks, present=len(cohort) - len(newcomers))
        records: list[ClientRecord] = []
        means, classes = mean_outputs(self.experiment.robust), class_means(self.experiment.robust)
        for update in self.collector.accepted(results, dict.fromkeys(newcomers, plan), records, self.state):
            assert update.profile is not None
            self.state.profiles[update.client] = update.profile
            self.state.samples[update.client] = update.samples
            if self.central is None:
                means.add(update)
            if update.prototypes is not None and starts_head:
                classes.add(update.prototypes)
        if newcomers:
            weights = self.state.weights
            shared = dict(weights.shared)
            if starts_head:
                weight, bias = head_parameters(self.context.model)
                shared[weight], shared[bias] = classes.head(shared[weight], shared[bias])
            self.state.weights = replace(
                weights, version=weights.version + 1, shared=shared, means=means.result(weights.means)
            )
            self.executor.publish(self.state.weights)
        return records

    @contextmanager
    def _profiled_ahead(self, round: int) -> Iterator[list[ClientRecord]]:
        """Profiles a later round's cohort on the weights published so far, while the block runs; yields the records."""
        records: list[ClientRecord] = []
        wanted = self.strategy.profiles_ahead and round <= self.experiment.rounds
        plan = uniform_plan(self.strategy.shape, Role.FROZEN, frozen_as=self.strategy.profiles_as)
        cohort = self.cohort(round) if wanted else ()
        tasks = [self.task("profile", round, client, plan) for client in cohort]
        if tasks:
            self.report_last()  # while they run in another thread, nobody may be told anything
        with meanwhile(self.executor, tasks, self.tracker.event) as results:
            yield records
            waited = time.perf_counter()
        self._phase.seconds["profile"] += time.perf_counter() - waited
        for update in self.collector.accepted(results, dict.fromkeys(cohort, plan), records, self.state):
            assert update.profile is not None
            self.state.profiles[update.client] = update.profile

    def report_last(self) -> None:
        """Waits for the evaluation of the last round where that is still due, and reports the round."""
        if self.state.unmeasured is not None:
            with self._phase("evaluate"):
                found = self.evaluator.result()
            self._report(self.state.unmeasured, found)

    # --------------------------------------------------------------------------------------------------- details

    def cohort(self, round: int) -> tuple[int, ...]:
        """Who takes part in a round."""
        if self.central is not None:
            return self.central.cohort(round)
        return select_cohort(self.experiment.clients, self.experiment.seed, round, self.examples)

    def client_info(self, client: int) -> ClientInfo:
        """What the strategy may know of a client."""
        tier = self.tiers[client].name
        resident, batch = self.budgets[tier]
        resident = max(self.context.model.shape.layers, resident >> self.state.demotion(client).halvings)
        samples = self.state.samples.get(client, self.examples[client])
        return ClientInfo(
            client=client,
            tier=tier,
            resident_experts=resident,
            batch_experts=min(batch, resident),
            samples=samples,
        )

    def task(self, kind: TaskKind, round: int, client: int, plan: ExpertPlan) -> ClientTask:
        """One client's task of a round."""
        weight = self.collector.predict(kind, client, len(plan.present))
        if kind == "train" and self.experiment.clients.over_select > 1:
            weight = -weight  # the quickest first: with their updates the round ends
        task = ClientTask(
            kind=kind,
            round=round,
            client=client,
            seed=self.experiment.seed,
            plan=plan,
            version=self.state.weights.version,
            personal=client if client in (self.state.weights.personal or {}) else None,
            weight=weight,
            state=self.state.clients.get(client) if kind == "train" else None,
            secure=self.secure.request(client) if kind == "train" and self.secure is not None else None,
        )
        return self.ladder.demoted(task)

    def facts(self) -> dict[str, Any]:
        """What is known before the first round."""
        samples = [self.state.samples.get(client, count) for client, count in enumerate(self.examples)]
        gpus = self.executor.has_gpus
        return reporting.run_facts(self.context, self.tiers, samples, self.resumed_from, self.predicted_mib, gpus=gpus)

    def summary(self, status: str) -> dict[str, Any]:
        """The keys of summary.json."""
        summary = reporting.run_summary(self.context, self.state, status, self.predicted_mib)
        spent = self._spent_of_examples(max(self.state.round, 0))
        if self.central is not None:
            spent = self.central.summary() | spent
        return summary | {"privacy": spent} if spent else summary

    def _begin(self, round: int, clients: int) -> float:
        self._phase = Phases()
        self.tracker.event("round_started", {"round": round, "cohort": clients})
        return time.perf_counter()

    def _end(
        self,
        round: int,
        started: float,
        averaged: Averaged,
        *,
        simulated: float | None,
        ahead: Sequence[ClientRecord] = (),
    ) -> None:
        """Evaluates, reports and saves a round; of what was done ahead for the next, only bytes and status count."""
        self.report_last()
        with self._phase("evaluate"):
            self.evaluator.begin(round)
            found = None if self.evaluator.overlaps else self.evaluator.result()
        seconds = time.perf_counter() - started
        self.state.record(round, [*averaged.records, *ahead], seconds, simulated)
        for record in averaged.records:
            self.tracker.event("client", asdict(record))
        report = reporting.round_report(
            round,
            averaged.records,
            averaged.updates,
            shape=self.strategy.shape,
            seconds=seconds,
            phases=self._phase.seconds,
            participation=averaged.participation,
            simulated=simulated,
            ahead=ahead,
            nodes=self.executor.usage(),
        )
        spent = dict(averaged.privacy) | self._spent_of_examples(round)
        report = replace(report, privacy=spent, **averaged.told)
        if found is None:
            self.state.unmeasured = report
        else:
            self._report(report, found)
        # Last: a server killed in between repeats the round, and the trackers drop what it had reported of it.
        save_checkpoint(self.checkpoints, self.state, self.identity, self.experiment.runtime.keep_checkpoints)

    def _spent_of_examples(self, rounds: int) -> dict[str, float]:
        """Epsilon and delta of any client's single examples after so many rounds, where those are private."""
        options = self.experiment.privacy.examples
        if options is None:
            return {}
        spent = accounting.example_epsilon(options, self.experiment.local, self.examples, rounds)
        return {"example_epsilon": spent, "example_delta": options.delta}

    def _report(self, report: RoundReport, found: Evaluation) -> None:
        self.state.unmeasured = None
        self.state.measured(report.round, found)
        self.tracker.round(reporting.with_evaluation(report, found))
