"""A round's tasks and what came back: who answered, whether enough did, and which updates may be used."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from hfedmoe_ray.config.schema import Experiment, Tier
from hfedmoe_ray.errors import TrainingError
from hfedmoe_ray.federation import reporting
from hfedmoe_ray.federation.ahead import Ahead
from hfedmoe_ray.federation.clock import Clock
from hfedmoe_ray.federation.demotion import Ladder
from hfedmoe_ray.federation.dropout import with_dropped
from hfedmoe_ray.federation.durations import Durations
from hfedmoe_ray.federation.executor import Notify
from hfedmoe_ray.federation.phases import Waiting
from hfedmoe_ray.federation.quorum import Proof, below_quorum, raise_common_failure, raise_common_flaw
from hfedmoe_ray.federation.state import FederationState
from hfedmoe_ray.federation.validation import NotAsTrained, Rejected, accept, accept_masked
from hfedmoe_ray.records import ClientRecord
from hfedmoe_ray.strategies import AnyStrategy
from hfedmoe_ray.strategies.staleness import rebased
from hfedmoe_ray.trust.limits import claims
from hfedmoe_ray.types import ClientTask, ClientUpdate, ExpertPlan, TaskKind, TaskResult, Weights

_DID: Mapping[TaskKind, str] = {
    "keys": "sent their keys",
    "shares": "shared their secrets",
    "upload": "uploaded their updates",
    "unmask": "helped to take the masks off the sum",
}
"""What too few have done, in steps of secure aggregation."""


class Collector:
    """Runs a round's tasks to a quorum of results, and turns those into validated updates."""

    def __init__(
        self,
        experiment: Experiment,
        ladder: Ladder,
        strategy: AnyStrategy,
        tiers: Sequence[Tier],
        *,
        dealt: Sequence[int],
        clock: Clock,
        notify: Notify,
    ) -> None:
        """Takes note of the run.

        Args:
            experiment: The run's quorum, attempts and codecs.
            ladder: Runs the tasks, and demotes who runs out of memory.
            strategy: Says what updates must contain.
            tiers: Tier of every client.
            dealt: Training examples that the server dealt each; 0 where they read their own.
            clock: Tells what a task would take on its client's device.
            notify: Is told what happens.
        """
        self._experiment = experiment
        self._ladder = ladder
        self._strategy = strategy
        self._tiers = tiers
        self._dealt = dealt
        self._clock = clock
        self._notify = notify
        self._durations = Durations()
        self._ahead = Ahead()
        self.waited = 0.0
        """Seconds of the last `collect` in which slots had nothing to do but others were still at work."""

    def tier(self, client: int) -> Tier:
        """The tier of a client."""
        return self._tiers[client]

    def predict(self, kind: TaskKind, client: int, experts: int) -> float:
        """What the next task of a client will take, to order tasks by (see `Durations.predict`)."""
        return self._durations.predict(kind, client, self._tiers[client].name, experts)

    def collect(self, tasks: Sequence[ClientTask], wanted: int | None = None, *, present: int = 0) -> list[TaskResult]:
        """Runs tasks until a quorum of them is in; returns one result per task, in client order.

        Args:
            tasks: One a client.
            wanted: Updates that are enough: once so many are in, who is still at work is dropped.
            present: Further clients of the round, which have nothing to do here: they count as having delivered.

        Raises:
            TrainingError: Below quorum after the configured attempts, or the same error on several clients.
        """
        results: dict[int, TaskResult] = {}
        tracebacks: dict[int, str] = {}
        self.waited = 0.0

        def notify(name: str, fields: Mapping[str, Any]) -> None:
            if "traceback" in fields:
                tracebacks[fields["client"]] = fields["traceback"]
            if "client" in fields:
                waiting.note(name, fields["client"])
            self._notify(name, fields)

        for _ in range(self._experiment.runtime.round_attempts):
            # Who has run out of memory has been given less and less in vain.
            missing = [
                results[task.client].task if task.client in results else task
                for task in tasks
                if task.client not in results or results[task.client].status not in ("ok", "memory")
            ]
            if results and not missing:
                break
            waiting = Waiting(task.client for task in missing)
            with closing(self._ladder.run(missing, notify)) as running:
                for result in running:
                    results[result.task.client] = result
                    if result.metrics is not None:
                        tier = self._tiers[result.task.client].name
                        self._durations.add(result.task, tier, result.metrics.seconds)
                    if wanted is not None and sum(one.status == "ok" for one in results.values()) >= wanted:
                        self.waited += waiting.seconds
                        return with_dropped(tasks, results)
            self.waited += waiting.seconds
            raise_common_failure(results.values(), tracebacks)
            if self.quorum([True] * present + [result.status == "ok" for result in results.values()]):
                return [results[client] for client in sorted(results)]
            self._notify("below_quorum", {"round": tasks[0].round})
        outcomes = [(c, r.status, r.reason) for c, r in sorted(results.items())]
        raise TrainingError(below_quorum(outcomes, _DID.get(tasks[0].kind, "delivered a usable update")))

    def accepted(
        self,
        results: Iterable[TaskResult],
        plans: Mapping[int, ExpertPlan],
        records: list[ClientRecord],
        state: FederationState,
    ) -> Iterator[ClientUpdate]:
        """Yields the updates that may be used, and records how each client fared.

        The next few are read and checked meanwhile (`ahead.Ahead`), so that memory does not grow with the cohort.

        The state a client returned is kept with its update, or discarded with it: what an update that was late, failed
        or rejected says was sent has not arrived.

        Args:
            results: How the tasks ended.
            plans: What each client was to do.
            records: Is given a record per result.
            state: Has the weights the tasks started from, and keeps the clients' states. Where runs are asynchronous,
                what an update changed of older ones is laid onto the newest.

        Raises:
            TrainingError: At the end, where updates were not trained as planned and it is not their clients' fault.
        """

        def read(delivered: TaskResult) -> tuple[TaskResult, TaskResult, ClientUpdate | None, Proof | None]:
            return delivered, *self._accept(delivered, plans[delivered.task.client], state)

        proofs: list[Proof] = []
        for delivered, result, update, proof in self._ahead.in_order(read, results):
            client = delivered.task.client
            if proof is not None:
                proofs.append(proof)
            start = state.version(result.task.version)
            record = reporting.client_record(result, self._tiers[client], update, start)
            if record.samples:
                record = replace(record, simulated_seconds=self._simulated(delivered.task, record))
            if self._experiment.backend == "local":
                record = replace(record, over_mib=0.0)  # the one process is everybody's, and the server's
            if record.over_mib:
                self._notify("over_memory", reporting.over_memory(record, self._tiers[client]))
            records.append(record)
            if update is not None:
                if delivered.state is not None:
                    state.clients[client] = delivered.state
                yield self._rebased(update, start, state.weights)
        raise_common_flaw(proofs)

    def _rebased(self, update: ClientUpdate, start: Weights, now: Weights) -> ClientUpdate:
        options = self._experiment.asynchronous
        return update if options is None else rebased(update, start, now, options.staleness)

    def _simulated(self, task: ClientTask, record: ClientRecord) -> float | None:
        sizes = {"samples": record.samples, "bytes_down": record.bytes_down, "bytes_up": record.bytes_up}
        return self._clock.seconds(task, **sizes)

    def _accept(
        self, result: TaskResult, plan: ExpertPlan, state: FederationState
    ) -> tuple[TaskResult, ClientUpdate | None, Proof | None]:
        """The result, which may be rejected now, the update in it, and what its checksums show; changes nothing."""
        if result.status != "ok":
            return result, None, None
        task = result.task
        tier = self._tiers[task.client].name
        proof = Proof(client=task.client, round=task.round, tier=tier, trainable=plan.trainable)
        limits = claims(self._experiment, task, self._dealt[task.client])
        try:
            if task.kind == "train" and self._experiment.secure is not None:
                profiled = self._experiment.secure.profiles == "clear"
                return result, accept_masked(result, profiled=profiled, limits=limits), None
            start = state.version(task.version).seen_by(task.personal)
            update = accept(result, plan, start, self._experiment.wire, self._strategy.signals, limits=limits)
        except Rejected as rejection:
            shown = replace(proof, flaw=rejection) if isinstance(rejection, NotAsTrained) else None
            return replace(result, status="rejected", reason=str(rejection)), None, shown
        return result, update, proof if task.kind == "train" else None

    def quorum(self, arrived: Iterable[bool]) -> bool:
        """Whether enough of those asked have delivered."""
        answers, secure = list(arrived), self._experiment.secure
        share = max(self._experiment.runtime.quorum, 0.0 if secure is None else secure.threshold)
        return sum(answers) >= share * len(answers) - 1e-9
