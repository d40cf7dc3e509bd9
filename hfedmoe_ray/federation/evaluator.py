"""Evaluating a round's model: at once, or while the round after it trains.

Tasks of an evaluation that overlaps a round come behind those of the round in the same run of the executor: they fill
slots that have nothing else to do, at the end of training and while the server is busy. What they find depends on
the version of the weights that they start from, which is kept for them, and not on when they run.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import inf

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.federation.demotion import Ladder
from hfedmoe_ray.federation.evaluation import Evaluation, benchmark_tasks, evaluation_tasks, own_tasks, summarise
from hfedmoe_ray.federation.executor import Notify
from hfedmoe_ray.federation.state import FederationState
from hfedmoe_ray.federation.stream import Stream
from hfedmoe_ray.strategies import AnyStrategy
from hfedmoe_ray.types import ClientInfo, ClientTask


class Evaluator:
    """Evaluates one round at a time."""

    def __init__(
        self,
        experiment: Experiment,
        executor: Stream,
        strategy: AnyStrategy,
        state: FederationState,
        *,
        ladder: Ladder,
        client_info: Callable[[int], ClientInfo],
        notify: Notify,
    ) -> None:
        """Takes note of the run.

        Args:
            experiment: Says what is evaluated when.
            executor: Runs the tasks, beside others.
            strategy: Plans what clients hold when they use the model.
            state: Has the weights that are evaluated.
            ladder: Knows how many examples at once clients were demoted to.
            client_info: What the strategy may know of a client.
            notify: Is told what happens.
        """
        self._experiment = experiment
        self._executor = executor
        self._strategy = strategy
        self._state = state
        self._ladder = ladder
        self._client_info = client_info
        self._notify = notify
        self._tasks: Sequence[ClientTask] = ()
        self.overlaps = False
        """Whether the evaluation that was begun last can wait for its result while the next round trains."""

    def begin(self, round: int) -> None:
        """Gives out the tasks that evaluate the weights as they are after a round; `result` waits for them."""
        tasks = self._due(round)
        # Where rounds wait for nobody, clients are at work during an evaluation anyway; in this process nothing is
        # gained. The last round has none after it.
        rounds = self._experiment.asynchronous is None and round < self._experiment.rounds
        self.overlaps = bool(tasks) and rounds and self._experiment.evaluate.overlap and self._executor.runs_elsewhere
        self._tasks = [replace(task, weight=-inf) for task in tasks] if self.overlaps else tasks
        self._executor.submit(self._tasks, self._notify)

    def result(self) -> Evaluation:
        """What the evaluation that was begun last has found, when that is known.

        Raises:
            TrainingError: A slice of the global test split could not be evaluated.
        """
        tasks, self._tasks = self._tasks, ()
        return summarise(map(self._executor.result, tasks))

    def _due(self, round: int) -> list[ClientTask]:
        """The global model, and clients holding only what their budget allows, where due."""
        when = self._experiment.evaluate
        last = round == self._experiment.rounds
        weights, strategy = self._state.weights, self._strategy
        tasks: list[ClientTask] = []
        if last or round % when.every == 0:
            tasks += evaluation_tasks(self._experiment, round, strategy, weights)
        if last or round == 0:
            tasks += benchmark_tasks(self._experiment, round, strategy, weights)
        if when.own == "always" or (when.own == "final" and last):
            clients = [self._client_info(client) for client in range(self._experiment.clients.count)]
            known = {c.client: c for c in clients if not strategy.needs_profile or c.client in self._state.profiles}
            strategy.study(weights)
            plans = strategy.deploy(round, list(known.values()), self._state.profiles)
            own = partial(own_tasks, self._experiment, round, strategy, weights, plans)
            tasks += own() + (
                [self._ladder.demoted(t) for t in own(trains=known)] if when.personalised and last else []
            )
        return tasks
