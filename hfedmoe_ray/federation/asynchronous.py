"""Rounds that wait for nobody: updates are averaged K at a time, whenever their clients are done (FedBuff).

A discrete-event simulation on the simulated clock. M clients are at work; the one whose task ends first, in simulated
time, is taken next (of several, the lowest number), and another client starts from the weights as they are then. What
is simulated is when things happen: the tasks are real, run at once, and each is waited for when it is its turn. So
results are the same on any machine, with any number of slots, and in a run that was resumed.

How long a task takes must be known before it has run: its upload is counted as planned, every trainable expert sent.
An update that is rejected is found out when its buffer is averaged, and counts among the K.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.errors import TrainingError
from hfedmoe_ray.estimates import predict_upload
from hfedmoe_ray.federation.availability import available
from hfedmoe_ray.federation.cohort import draw_clients
from hfedmoe_ray.federation.dropout import without_dropouts
from hfedmoe_ray.federation.executor import Executor
from hfedmoe_ray.federation.flight import Flight
from hfedmoe_ray.federation.quorum import raise_common_failure
from hfedmoe_ray.federation.reporting import published_bytes
from hfedmoe_ray.federation.rounds import Federation
from hfedmoe_ray.records import ClientRecord
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.tracking.tracker import Tracker
from hfedmoe_ray.types import ClientTask, ExpertPlan, TaskResult

_STALE = "trained from weights {tau} averages old, and asynchronous.max_staleness is {most}"


class AsynchronousFederation(Federation):
    """A server that averages a buffer of updates as soon as it is full; that is its round."""

    def __init__(self, context: RunContext, executor: Executor, tracker: Tracker, *, resume: bool) -> None:
        """Starts from the prepared model, or from the last checkpoint with the tasks that were under way then."""
        assert context.experiment.asynchronous is not None
        self.options = context.experiment.asynchronous
        super().__init__(context, executor, tracker, resume=resume)
        self._tasks: dict[int, ClientTask] = {}
        """Under way, by client."""
        self._tracebacks: dict[int, str] = {}

    def run(self, should_stop: Callable[[], bool]) -> bool:
        """See `Federation.run`. Tasks still under way at the end are stopped; a checkpoint knows them."""
        for flight in self.state.flights:
            self._submit(flight)
        for _, older in sorted(self.state.older.items()):
            self.executor.publish(older)
        return super().run(should_stop)

    def train_round(self, round: int) -> None:
        """Fills a buffer and averages it."""
        started = self._begin(round, self.options.buffer)
        with self._phase("train"):
            landed, results = self.fill_buffer(round)
        plans = {client: flight.plan for client, flight in landed.items()}
        last = self.state.weights
        with self._phase("reduce"):
            averaged = self.averaging.reduce(results, plans)
        with self._phase("publish"):
            needed = {flight.version for flight in self.state.flights}
            known = {**self.state.older, last.version: last}
            self.state.older = {number: known[number] for number in sorted(needed)}
            self.executor.publish(self.state.weights)
        records = [_as_simulated(record, landed[record.client], round, last.version) for record in averaged.records]
        now = max((flight.ends for flight in landed.values()), default=self.now)
        self._end(round, started, replace(averaged, records=records), simulated=now - self.now)

    @property
    def now(self) -> float:
        """The simulated clock at the end of the last round."""
        return self.state.simulated[-1]

    def fill_buffer(self, round: int) -> tuple[dict[int, Flight], list[TaskResult]]:
        """Takes tasks in the order in which they end until K updates are in, and starts others in their place.

        Where nobody is left to be asked in this round, it must do with fewer.

        Returns:
            By client what has ended, and how, in client order: K updates that can be used, and those that failed or
            came too late.

        Raises:
            TrainingError: Nobody is available and nothing under way, or several clients fail with the same error.
        """
        now, flights = self.now, self.state.flights
        landed: dict[int, Flight] = {}
        results: dict[int, TaskResult] = {}
        while sum(result.status == "ok" for result in results.values()) < self.options.buffer:
            self._start(round, now, landed)
            if not flights:
                break
            flight = min(flights, key=lambda one: (one.ends, one.client))
            result = self.executor.result(self._tasks.pop(flight.client))
            flights.remove(flight)
            now = flight.ends
            landed[flight.client], results[flight.client] = flight, self._judged(result)
            raise_common_failure(results.values(), self._tracebacks)
        if not results:
            raise TrainingError(
                f"no client is available in round {round} (clients.availability), and none is at work. The last "
                "checkpoint is complete: let more of them be there, and `hfedmoe resume`."
            )
        return landed, [results[client] for client in sorted(results)]

    def _start(self, round: int, now: float, landed: Mapping[int, Flight]) -> None:
        """Gives work to as many clients as there is room for, of those that neither are at work nor were this round."""
        busy = {*self._tasks, *landed}
        there = available(self.experiment.clients, self.experiment.seed, round)
        idle = np.array([client for client in there if client not in busy and self._known(int(client))], dtype=int)
        room = self.options.in_flight - len(self.state.flights)
        if not len(idle) or not room:
            return
        rng = generator(self.experiment.seed, "asynchronous", round, len(landed))
        cohort = draw_clients(self.experiment.clients, idle, room, self.examples, rng)
        self.strategy.study(self.state.weights)
        plans = self.strategy.plan(round, [self.client_info(client) for client in cohort], self.state.profiles)
        for client, plan in plans.items():
            flight = self._flight(round, client, plan, now)
            self.state.flights.append(flight)
            self._submit(flight)

    def _known(self, client: int) -> bool:
        """Whether a client can be planned for."""
        return client in self.state.profiles or not self.strategy.needs_profile

    def _flight(self, round: int, client: int, plan: ExpertPlan, now: float) -> Flight:
        task = self.task("train", round, client, plan)
        seconds = self.clock.seconds(
            task,
            samples=self.client_info(client).samples or self.experiment.local.batch_size,
            bytes_down=published_bytes(self.state.weights, task),
            bytes_up=predict_upload(
                self.experiment, self.context.model.shape, len(plan.trainable), len(plan.present) + len(plan.merged)
            ),
        )
        assert seconds is not None, "the schema wants a device for every tier"
        return Flight(client=client, round=round, version=task.version, plan=plan, started=now, seconds=seconds)

    def _submit(self, flight: Flight) -> None:
        """Hands a task to the executor, which starts those first that will be waited for first."""
        task = self.task("train", flight.round, flight.client, flight.plan)
        task = replace(task, version=flight.version, weight=-flight.ends)
        self._tasks[flight.client] = task
        self.executor.submit([task], self._note)

    def _judged(self, result: TaskResult) -> TaskResult:
        """A result as the buffer takes it: dropped where it is too stale, or where its client drops out."""
        tau, most = self.state.weights.version - result.task.version, self.options.max_staleness
        if result.status == "ok" and tau > most:
            return TaskResult(
                task=result.task,
                status="dropped",
                metrics=result.metrics,
                reason=_STALE.format(tau=tau, most=most),
                attempts=result.attempts,
            )
        (judged,) = without_dropouts([result], self.experiment.clients.failure_rate)
        return judged

    def _note(self, name: str, fields: Mapping[str, Any]) -> None:
        if "traceback" in fields:
            self._tracebacks[fields["client"]] = fields["traceback"]
        self.tracker.event(name, fields)


def _as_simulated(record: ClientRecord, flight: Flight, round: int, version: int) -> ClientRecord:
    """The record of what came to a round's buffer: by that round, and by the seconds that its turn was decided by."""
    return replace(record, round=round, simulated_seconds=flight.seconds, staleness=version - flight.version)
