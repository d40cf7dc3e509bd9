"""Clients that run out of memory: they are given less to do at once, then fewer experts, until it fits (ours).

The ladder of a client, tried downwards, each rung once:

1. The examples that pass through the model at once halve, down to 1. Gradients are added up over the batch, so that
   only rounding changes.
2. The memory budget for experts halves, down to one expert a layer, and the strategy plans the client anew. Strategies
   without a budget give the same plan again; their clients stop at one example.

A client that found its rung stays there in later rounds. One that finds none delivers nothing (status "memory"); in a
later round it is tried again, once, on the lowest rung.
"""

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace

from hfedmoe_ray.config.schema import Experiment, Tier
from hfedmoe_ray.federation.executor import Executor, Notify
from hfedmoe_ray.federation.state import FederationState
from hfedmoe_ray.strategies import AnyStrategy
from hfedmoe_ray.types import ClientInfo, ClientTask, TaskResult


class Ladder:
    """Runs tasks, and runs those that ran out of memory again in a smaller form."""

    def __init__(
        self,
        experiment: Experiment,
        executor: Executor,
        strategy: AnyStrategy,
        state: FederationState,
        *,
        tiers: Sequence[Tier],
        client_info: Callable[[int], ClientInfo],
    ) -> None:
        """Takes note of the run.

        Args:
            experiment: The run's batch size.
            executor: Runs the tasks.
            strategy: Plans clients that are to hold fewer experts.
            state: Keeps what clients were demoted to.
            tiers: Tier of every client.
            client_info: What the strategy may know of a client, by what it was demoted to.
        """
        self._experiment = experiment
        self._executor = executor
        self._strategy = strategy
        self._state = state
        self._tiers = tiers
        self._client_info = client_info

    def demoted(self, task: ClientTask) -> ClientTask:
        """The task with no more examples at once than its client was demoted to (what it holds is the plan's)."""
        return replace(task, micro_batch=self._state.demotion(task.client).micro_batch)

    def run(self, tasks: Sequence[ClientTask], notify: Notify) -> Generator[TaskResult, None, None]:
        """Runs tasks, one a client; yields a result for each as it is decided.

        What is tried again starts when all others are done. The result's task is the one that was tried last.
        """
        demotions: Counter[int] = Counter()
        left = list(tasks)
        while left:
            again: list[ClientTask] = []
            with closing(self._executor.run(left, notify)) as running:
                for result in running:
                    client = result.task.client
                    if result.status != "memory":
                        yield replace(result, demotions=demotions[client])
                    elif smaller := self._smaller(result, notify):
                        demotions[client] += 1
                        again.append(smaller)
                    else:
                        yield replace(result, demotions=demotions[client], reason=self._advice(result))
            left = again

    def _smaller(self, result: TaskResult, notify: Notify) -> ClientTask | None:
        """The next rung: the task to try instead, which the state keeps; None where there is none left."""
        task = result.task
        before, examples = self._state.demotion(task.client), self._examples_at_once(task)
        if examples > 1:
            self._state.demotions[task.client] = replace(before, micro_batch=examples // 2)
            smaller = self.demoted(task)
            told = f"{examples} examples at once", f"{examples // 2} examples at once"
        elif task.kind == "train" and (fewer := self._with_fewer_experts(task)):
            smaller = fewer
            told = f"{len(task.plan.trainable)} experts that train", f"{len(smaller.plan.trainable)} experts that train"
        else:
            return None
        about = {"client": task.client, "round": task.round, "kind": task.kind}
        notify("demoted", about | {"from": told[0], "to": told[1], "reason": f"{result.reason}: {told[0]} → {told[1]}"})
        return smaller

    def _with_fewer_experts(self, task: ClientTask) -> ClientTask | None:
        """The task with another plan, for half the budget or less; None where no budget changes the plan."""
        before = self._state.demotion(task.client)
        halvings, layers = before.halvings, self._strategy.shape[0]
        while self._client_info(task.client).resident_experts > layers:
            halvings += 1
            self._state.demotions[task.client] = replace(before, halvings=halvings)
            client = self._client_info(task.client)
            plan = self._strategy.plan(task.round, [client], self._state.profiles)[task.client]
            if plan != task.plan:
                return replace(task, plan=plan)
        self._state.demotions[task.client] = before
        return None

    def _examples_at_once(self, task: ClientTask) -> int:
        """How many examples passed through the model together."""
        tier, local = self._tiers[task.client], self._experiment.local
        wanted = task.micro_batch or (tier.micro_batch if task.kind == "train" else None) or local.batch_size
        there = self._client_info(task.client).samples or wanted
        if task.kind == "profile":
            there = min(there, local.profile_examples)
        return min(wanted, local.batch_size, there)

    def _advice(self, result: TaskResult) -> str:
        """Why a client delivers nothing, and what would mend it."""
        tier = self._tiers[result.task.client]
        number = self._experiment.clients.tiers.index(tier)
        trained = len(result.task.plan.trainable)
        held = f" and {trained} experts that train" if trained else ""
        gradients = "" if tier.checkpoint_activations else ", set its checkpoint_activations"
        return (
            f"out of memory even with one example at once{held} ({result.reason}). Raise "
            f"clients.tiers.{number}.memory_gib from {tier.memory_gib:g} (on a GPU, its device){gradients}, or lower "
            "data.max_length."
        )
