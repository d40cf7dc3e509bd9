"""The executor of `backend: ray`: client actors, and the loop that gives them tasks and survives their deaths.

`actors: dedicated` keeps one actor per client alive; `actors: pooled` keeps slots, sized for the tiers, in which
clients take turns. Both are the same loop over slots; they differ in which tasks a slot serves.
"""

import time
import uuid
from collections.abc import Generator, Sequence
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError, TaskCancelledError

from hfedmoe_ray.budget import tier_of
from hfedmoe_ray.context import RunContext
from hfedmoe_ray.errors import HFedMoEError, TrainingError
from hfedmoe_ray.federation.executor import Further, Notify, nothing_further
from hfedmoe_ray.records import NodeUsage
from hfedmoe_ray.runtime import cluster, timeouts
from hfedmoe_ray.runtime.client import Loading
from hfedmoe_ray.runtime.holder import alive, start_holder
from hfedmoe_ray.runtime.nodes import NodeMeters
from hfedmoe_ray.runtime.results import about, decided, finished, told
from hfedmoe_ray.runtime.room import FreeRoom, Queue
from hfedmoe_ray.runtime.scaling import Stranded, free_room, further_slots, plan_when_there, release
from hfedmoe_ray.runtime.slot import ActorRecipe, Attempt, Slot, State
from hfedmoe_ray.runtime.transfer import Directory, directory_hash
from hfedmoe_ray.runtime.weights import WeightStore
from hfedmoe_ray.runtime.worker import WorkerFactory, client_worker, late_reason
from hfedmoe_ray.types import ClientTask, TaskResult, Weights

_SHOWN = ("CPU", "GPU", "memory")
START_ATTEMPTS = 2
"""A slot whose actors die so often before they are loaded is given up."""


class RayExecutor:
    """Runs tasks on client actors (see `federation.executor.Executor`). Ray must be connected."""

    runs_elsewhere = True

    def __init__(self, context: RunContext, *, worker_factory: WorkerFactory = client_worker) -> None:
        """Plans the actors and starts them all; they load while the server goes on.

        Raises:
            CapacityError: the actors do not fit the cluster; none has been made.
        """
        self._context = context
        self._runtime = context.experiment.runtime
        self._store = WeightStore()
        specs = plan_when_there(context.experiment)
        self._nodes = {node.node for node in cluster.capacity()}
        """Those there were when they were last looked at."""
        self._home = ray.get_runtime_context().get_node_id()
        self._recipe = ActorRecipe(
            context=context,
            worker_factory=worker_factory,
            namespace=f"{context.experiment.name}-{uuid.uuid4().hex[:8]}",
            home=self._home,
            tiers=tuple(tier.name for tier in tier_of(context.experiment.clients)),
            ranked=frozenset(tier.name for tier in context.experiment.clients.tiers if tier.ranks > 1),
        )
        self._directories: dict[str, Directory] = {}
        self._holders: dict[tuple[str, str], Any] = {}
        """Holder of the frozen tensors by (node, GPU), where clients share a GPU."""
        self._last_loss = ""
        self._queue = Queue(self._runtime.scale_up_s)
        self._stranded = Stranded(self._runtime.scale_up_s)
        self.slots = tuple(Slot(number, spec, self._recipe) for number, spec in enumerate(specs))
        self.has_gpus = any(slot.spec.resources.num_gpus for slot in self.slots)
        self._start_all()
        self._meters = NodeMeters()

    def publish(self, weights: Weights, keep: frozenset[int] = frozenset()) -> None:
        """See `Executor.publish`."""
        self._store.publish(weights, keep)

    def run(
        self, tasks: Sequence[ClientTask], notify: Notify, further: Further = nothing_further
    ) -> Generator[TaskResult, None, None]:
        """See `Executor.run`.

        Raises:
            CapacityError: other work on the cluster holds all room for some clients, and went on doing so.
            ClusterError: no actor can be started, or the cluster has lost every place for one.
            HFedMoEError: what an actor said when it loaded the model or the data.
        """
        ready = sorted((Attempt(task) for task in tasks), key=_turn)
        left = len(ready)
        try:
            self._look_around(notify)
            while left:
                self._dispatch(ready, notify)
                for slot, answered in self._events(ready, notify):
                    result = self._advance(slot, answered, ready, notify)
                    if result is not None:
                        left -= 1
                        yield result
                        if more := further():
                            left += len(more)
                            ready[:] = sorted([*ready, *map(Attempt, more)], key=_turn)
                            self._look_around(notify)
                            break  # slots may have been replaced: what else has happened is asked again
        finally:
            for slot in self.slots:
                if slot.state is State.BUSY:
                    slot.ask_to_stop()

    def usage(self) -> tuple[NodeUsage, ...]:
        """See `Executor.usage`."""
        return self._meters.read()

    def close(self) -> None:
        """Kills the pool's own actors and drops its objects."""
        self._meters.close()
        for slot in self.slots:
            slot.kill()
        for holder in self._holders.values():
            ray.kill(holder)
        self._holders.clear()
        self._store.clear()
        if self._runtime.scale_up_s:
            release()

    def _start_all(self) -> None:
        """Starts an actor in every slot; where other work leaves no room for all of them, in the order of the plan.

        That puts first what no other slot can stand in for. Asked for at the same time, a smaller slot's room can be
        given first, and then be what the larger one lacks: so each has its room before the next one asks.
        """
        room = FreeRoom()
        fitting = [room.take(slot.spec) for slot in self.slots]
        in_turn = crowded = not all(fitting)
        for slot, fits in zip(self.slots, fitting, strict=True):
            slot.start(self._offer(slot), queue=crowded)
            if in_turn and fits:
                in_turn = slot.look_for_room(timeouts.ROOM_GIVEN)

    # ------------------------------------------------------------------------------------------------- the loop

    def _dispatch(self, ready: list[Attempt], notify: Notify) -> None:
        """Gives the longest task first to the smallest idle slot that serves it."""
        idle = sorted(
            (slot for slot in self.slots if slot.state is State.IDLE), key=lambda slot: slot.spec.resources.size
        )
        for attempt in list(ready):
            if not idle:
                return
            slot = next((slot for slot in idle if slot.serves(attempt.task)), None)
            if slot is None:
                continue
            idle.remove(slot)
            ready.remove(attempt)
            slot.assign(attempt, self._store.refs(attempt.task), self._runtime.deadline_s)
            notify("task_started", about(attempt.task) | {"slot": slot.number, "attempt": attempt.number})

    def _events(self, ready: Sequence[Attempt], notify: Notify) -> list[tuple[Slot, bool]]:
        """Waits until some slot has an answer or is past its deadline; returns (slot, whether it has answered).

        Returns nothing where the cluster is to be looked at once more.

        Raises:
            CapacityError: see `room.Queue`.
            ClusterError: see `scaling.Stranded`.
        """
        for slot in self._queue.look(self.slots):
            self._replace(slot, "its node is lost", notify)
        looking = self._queue.goes_on(self.slots, ready, notify)
        if self._stranded.wait(self.slots, ready, self._last_loss, notify):
            looking = True
            self._follow_cluster(notify)
        waiting = {slot.watched: slot for slot in self.slots if slot.watched is not None}
        if not waiting:
            time.sleep(timeouts.CLUSTER_POLL)
            return []
        patience = max(0.0, min(slot.deadline for slot in waiting.values()) - time.monotonic())
        if looking:
            patience = min(patience, timeouts.CLUSTER_POLL)
        answered, silent = ray.wait(list(waiting), num_returns=1, timeout=patience)
        if answered and silent:
            # Whoever else has answered by now: with many short tasks that saves most turns of the loop.
            further, silent = ray.wait(silent, num_returns=len(silent), timeout=0)
            answered += further
        now = time.monotonic()
        expired = [waiting[ref] for ref in silent if waiting[ref].deadline <= now]
        return [(waiting[ref], True) for ref in answered] + [(slot, False) for slot in expired]

    def _advance(self, slot: Slot, answered: bool, ready: list[Attempt], notify: Notify) -> TaskResult | None:
        """Makes the transition a slot is due for; returns the result of its task if that is decided."""
        match slot.state:
            case State.STARTING if answered:
                self._finish_start(slot, notify)
            case State.STARTING:
                free = {name: amount for name, amount in ray.available_resources().items() if name in _SHOWN}
                self._give_up(slot, f"no actor within {timeouts.CLIENT_START:g} s; free in the cluster: {free}", notify)
            case State.IDLE if answered:
                self._replace(slot, told(slot.cause_of_death()), notify)
            case State.BUSY if answered:
                return self._finish_task(slot, ready, notify)
            case State.BUSY:
                return self._leave_behind(slot, notify)
            case State.STOPPING if answered:
                self._finish_stop(slot, notify)
            case State.STOPPING:
                self._replace(slot, f"did not stop within {timeouts.STOP_GRACE:g} s", notify)
        return None

    # ------------------------------------------------------------------------------------------ ends of each state

    def _finish_start(self, slot: Slot, notify: Notify) -> None:
        """STARTING → IDLE; or the files the node lacks are sent; or the actor died and is replaced."""
        try:
            loading = slot.loading()
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else None
            if isinstance(cause, HFedMoEError):
                raise cause from None
            if cause is not None and not isinstance(cause, RayError):
                raise TrainingError(f"A client actor cannot load the model or the data: {told(error)}") from error
            self._forget_dead_holders(slot.spec.node)
            slot.failed_starts += 1
            if slot.failed_starts < START_ATTEMPTS:
                self._replace(slot, told(error), notify)
            else:
                self._give_up(slot, told(error), notify)
            return
        if loading.missing:
            for name in loading.missing:
                if self._directories[name].files is None:
                    self._directories[name] = self._directories[name].offered()
            notify("files_sent", {"slot": slot.number, "what": list(loading.missing)})
            slot.load(self._directories)
            return
        if loading.gpu:
            slot.load(self._offer(slot), self._holder(slot.spec.node, loading))
            return
        seconds = time.monotonic() - slot.since
        slot.rest()
        about = {"slot": slot.number, "tiers": list(slot.spec.tiers), "pid": loading.pid, "node": slot.spec.node}
        notify("slot_ready", about | {"seconds": seconds})

    def _finish_task(self, slot: Slot, ready: list[Attempt], notify: Notify) -> TaskResult | None:
        """BUSY → IDLE with a result; or the actor died, is replaced, and the task goes back to be tried again."""
        assert slot.attempt is not None
        attempt, seconds = slot.attempt, time.monotonic() - slot.since
        try:
            delivered = slot.answer()
        except RayError as error:
            return self._lose(slot, attempt, error, ready, notify)
        self._settle(slot, notify)
        return decided(attempt, delivered, seconds, notify)

    def _leave_behind(self, slot: Slot, notify: Notify) -> TaskResult:
        """BUSY → STOPPING: the round goes on without this client."""
        assert slot.attempt is not None
        attempt, seconds = slot.attempt, time.monotonic() - slot.since
        slot.ask_to_stop()
        return finished(attempt, "late", late_reason(self._runtime.deadline_s), seconds, notify)

    def _finish_stop(self, slot: Slot, notify: Notify) -> None:
        """STOPPING → IDLE, whatever the late task answered."""
        try:
            slot.answer()
        except (RayTaskError, TaskCancelledError):
            self._settle(slot, notify)
        except RayError as error:
            self._replace(slot, told(error), notify)
        else:
            self._settle(slot, notify)

    def _settle(self, slot: Slot, notify: Notify) -> None:
        """The slot's actor has no task any more: → IDLE, unless it is a gang whose ranks are out of step."""
        if slot.parted:
            self._replace(slot, "a rank of its gang failed, and the others cannot go on without it", notify)
        else:
            slot.rest()

    # ------------------------------------------------------------------------------------------- deaths of actors

    def _lose(
        self, slot: Slot, attempt: Attempt, error: RayError, ready: list[Attempt], notify: Notify
    ) -> TaskResult | None:
        """Replaces a dead actor; its task is first in the queue again, or fails where it has been tried enough.

        If memory was the cause (Ray says so where it ended the process for its node's sake), it is not tried again as
        it is. Of a process within its budget that the kernel ended nobody knows; that is like any death.
        """
        seconds, reason = time.monotonic() - slot.since, told(error)
        of_memory = isinstance(error, OutOfMemoryError) or slot.died_of_memory()
        self._replace(slot, reason, notify)
        if of_memory:
            return finished(attempt, "memory", f"its process died out of memory: {reason}", seconds, notify)
        if attempt.number > self._runtime.retries:
            return finished(attempt, "failed", f"its process died {attempt.number} times: {reason}", seconds, notify)
        ready.insert(0, Attempt(attempt.task, attempt.number + 1))
        notify("task_retried", about(attempt.task) | {"attempt": attempt.number + 1, "reason": reason})
        return None

    def _replace(self, slot: Slot, reason: str, notify: Notify) -> None:
        """Starts another actor in the slot, on another node where its own is lost."""
        notify("slot_lost", {"slot": slot.number, "reason": reason})
        self._last_loss = reason
        slot.kill()
        nodes = cluster.capacity()
        if slot.spec.node not in {node.node for node in nodes}:
            place = free_room(slot, self.slots, nodes)
            if place is None:
                self._give_up(slot, "its node is lost, and no other has room for it", notify)
                return
            slot.move(place)
        # Other work may have taken the room since.
        slot.start(self._offer(slot), queue=True)

    def _look_around(self, notify: Notify) -> None:
        """Uses nodes that have joined; and no attempt is to be wasted on an actor that died while it was idle."""
        self._follow_cluster(notify)
        for slot in self.slots:
            if slot.state is State.IDLE and slot.dead:
                self._replace(slot, told(slot.cause_of_death()), notify)

    def _follow_cluster(self, notify: Notify) -> None:
        """Where nodes have joined: brings back slots that were given up, and adds those the larger cluster holds."""
        nodes = cluster.capacity()
        joined = {node.node for node in nodes} - self._nodes
        self._nodes = {node.node for node in nodes}
        if not joined:
            return
        for slot in self.slots:
            if slot.state is State.GONE and (place := free_room(slot, self.slots, nodes)) is not None:
                slot.move(place)
                slot.failed_starts = 0
                self._add(slot, notify)
        for spec in further_slots(self._context.experiment, self.slots, nodes, joined):
            self.slots = (*self.slots, Slot(len(self.slots), spec, self._recipe))
            self._add(self.slots[-1], notify)

    def _add(self, slot: Slot, notify: Notify) -> None:
        notify("slot_added", {"slot": slot.number, "tiers": list(slot.spec.tiers), "node": slot.spec.node})
        slot.start(self._offer(slot), queue=True)

    def _give_up(self, slot: Slot, reason: str, notify: Notify) -> None:
        """The slot will have no actor any more."""
        slot.kill()
        self._last_loss = reason
        notify("slot_gone", {"slot": slot.number, "tiers": list(slot.spec.tiers), "reason": reason})

    def _holder(self, node: str, loading: Loading) -> Any:
        """The actor that has the frozen tensors of a GPU; started for the first client there."""
        if (node, loading.gpu) not in self._holders:
            assert loading.model is not None
            lora = self._context.experiment.model.lora
            self._holders[node, loading.gpu] = start_holder(loading.model, lora, node, loading.gpu)
        return self._holders[node, loading.gpu]

    def _forget_dead_holders(self, node: str) -> None:
        """After a failed start: what aliased a dead holder's memory is of no use, and the next client needs another."""
        for place in [place for place in self._holders if place[0] == node]:
            if not alive(self._holders[place]):
                del self._holders[place]

    def _offer(self, slot: Slot) -> dict[str, Directory]:
        """What an actor of this slot has to look for: nothing on the server's own node."""
        if slot.spec.node == self._home:
            return {}
        if not self._directories:
            paths = {"model": self._context.model.path, "data": self._context.data.path}
            self._directories = {name: Directory(path=p, sha256=directory_hash(p)) for name, p in paths.items()}
        return self._directories


def _turn(attempt: Attempt) -> tuple[bool, float, int]:
    """What is tried again comes first, then what takes longest."""
    return attempt.number == 1, -attempt.task.weight, attempt.task.client
