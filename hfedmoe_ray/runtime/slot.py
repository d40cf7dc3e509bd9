"""One slot: a place for a client actor, which may die and be replaced, and what the actor is doing.

    STARTING --loaded--> IDLE --assign--> BUSY --answer--> IDLE
                                          BUSY --deadline--> STOPPING --answer--> IDLE
    Whatever it is doing, an actor that dies (or does not stop) is replaced, or its slot is GONE: --> STARTING or GONE

The pool owns the transitions; a slot knows how to make each of them.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from hfedmoe_ray.budget import SlotSpec
from hfedmoe_ray.context import RunContext
from hfedmoe_ray.runtime import timeouts
from hfedmoe_ray.runtime.cap import died_of_memory
from hfedmoe_ray.runtime.client import Answer, Loading
from hfedmoe_ray.runtime.gang import Processes, start_processes
from hfedmoe_ray.runtime.transfer import Directory
from hfedmoe_ray.runtime.weights import StoredState, TaskRefs, keep_state
from hfedmoe_ray.runtime.worker import WorkerFactory
from hfedmoe_ray.types import ClientTask


class State(Enum):
    """What a slot's actor is doing."""

    STARTING = auto()
    IDLE = auto()
    BUSY = auto()
    STOPPING = auto()
    """Its task is late and was asked to stop; what it still answers is thrown away."""
    GONE = auto()
    """No node has room for it any more, or its actors die before they are loaded."""


@dataclass(frozen=True)
class Attempt:
    """A task and how often it has been tried, this time included."""

    task: ClientTask
    number: int = 1


@dataclass(frozen=True, kw_only=True)
class Delivered:
    """What an actor returned of a task."""

    payload: Any = None
    """Reference to the bytes of the update."""
    payload_bytes: int = 0
    state: StoredState | None = None
    """The client's new state; None where it has not changed."""
    state_bytes: int = 0
    answer: Answer


NOT_BYTES = Delivered(answer=("rejected", b"", "it returned something else than bytes and text"))


def plain(payload: Any, reply: Any) -> bool:
    """Whether what an actor returned is what `ClientActor.execute` says: bytes and text, and no object of any class.

    Ray has unpickled it by now (who can run a process of their own in the cluster needs no update to do harm); what is
    asked here is that nothing else is ever handed on.
    """
    if type(reply) is not tuple or len(reply) != 2:
        return False
    state, answer = reply
    arrays = all(type(one) is np.ndarray and one.dtype == np.uint8 and one.ndim == 1 for one in (payload, state))
    return arrays and type(answer) is tuple and [type(one) for one in answer] == [str, bytes, str]


@dataclass(frozen=True, kw_only=True)
class ActorRecipe:
    """What all actors of a pool have in common."""

    context: RunContext
    worker_factory: WorkerFactory
    namespace: str
    home: str
    """The server's node."""
    tiers: tuple[str, ...]
    """Tier of every client."""
    ranked: frozenset[str]
    """Tiers whose clients run as several ranks."""


class Slot:
    """A slot and its current actor, or its gang of actors, of which the first stands for all."""

    def __init__(self, number: int, spec: SlotSpec, recipe: ActorRecipe) -> None:
        self.number = number
        self.spec = spec
        self.state = State.GONE
        self.attempt: Attempt | None = None
        self.failed_starts = 0
        self.fresh = True
        """Whether the actor has not had a task yet."""
        self.deadline = 0.0
        self.since = 0.0
        self.watched: Any = None
        """The reference whose readiness ends the current state; None when gone."""
        self._recipe = recipe
        self._generation = 0
        self.processes: Processes | None = None
        """What lives here; None when gone."""
        self._actor: Any = None
        """The one that answers."""
        self.parted = False
        """Whether the ranks of a gang are out of step, so that they can serve no more."""
        self._reply: Any = None
        """Reference to the client's new state and the small answer."""
        self._lifeline: Any = None
        self._placed = False

    @property
    def name(self) -> str:
        """The actor's name in the run's namespace; a replacement is told from the first by its generation."""
        run = self._recipe.context.experiment.name
        who = f"slot-{self.number:02d}" if self.spec.client is None else f"client-{self.spec.client:03d}"
        return f"{run}-{who}" + (f"-{self._generation}" if self._generation > 1 else "")

    def serves(self, task: ClientTask) -> bool:
        """Whether a task may be given to this slot."""
        if self.spec.client is not None:
            return task.client == self.spec.client
        return self._recipe.tiers[task.client] in self.spec.tiers

    def start(self, directories: Mapping[str, Directory], *, queue: bool) -> None:
        """Creates an actor on the slot's node and lets it load; does not wait.

        Args:
            directories: What it has to look for on that node.
            queue: Whether room for it may be missing: see `start_processes`.
        """
        self._generation += 1
        recipe = self._recipe
        ranked = frozenset(client for client, tier in enumerate(recipe.tiers) if tier in recipe.ranked)
        named = {"name": self.name, "namespace": recipe.namespace}
        self.processes = start_processes(self.spec, recipe.context, recipe.worker_factory, ranked, queue=queue, **named)
        self._actor = self.processes.leader
        self.parted = False
        self.fresh = True
        self._lifeline = self._actor.live.remote()
        self._placed = self.processes.group is None
        self._enter(State.STARTING, timeouts.CLIENT_START if self._placed else None)
        self.load(directories)

    @property
    def queued(self) -> bool:
        """Whether its actors wait, as far as is known, for room that something else on the node holds."""
        return self.state is State.STARTING and not self._placed

    def look_for_room(self, patience: float = 0.0) -> bool:
        """Returns whether Ray has given queued actors their room, or does soon: from then on they are starting."""
        if self.processes is not None and self.processes.group is not None and self.processes.group.wait(patience):
            self._placed = True
            self._enter(State.STARTING, timeouts.CLIENT_START)
        return self._placed

    def load(self, directories: Mapping[str, Directory], holder: Any = None) -> None:
        """Asks the actor to load (again, with files it lacked, or with the holder of its GPU's frozen tensors)."""
        self.watched = self._actor.load.remote(directories, holder)

    def loading(self) -> Loading:
        """How the actor's loading went. Raises what `ray.get` raises."""
        loading: Loading = ray.get(self.watched, timeout=timeouts.FETCH)
        return loading

    def rest(self) -> None:
        """The actor is ready for a task; all that can happen to it is to die."""
        self.watched = self._lifeline
        self._reply = self.attempt = None
        self.failed_starts = 0
        self._enter(State.IDLE, None)

    def assign(self, attempt: Attempt, refs: TaskRefs, limit: float) -> None:
        """Gives the actor a task, to be done within `limit` seconds."""
        self.attempt = attempt
        # The payload is what is waited for: it is ready only once it has been copied to this node, so that losing
        # the client's node later loses no finished work.
        self.watched, self._reply = self._actor.execute.remote(replace(attempt.task, state=None), refs)
        self._enter(State.BUSY, limit + timeouts.FIRST_CALL_GRACE * self.fresh)
        self.fresh = False

    @property
    def dead(self) -> bool:
        """Whether the process has died, as far as Ray knows."""
        return bool(ray.wait([self._lifeline], timeout=0)[0])

    def cause_of_death(self) -> RayError:
        """Ray's account of it."""
        try:
            ray.get(self._lifeline, timeout=timeouts.FETCH)
        except RayError as error:
            return error
        raise AssertionError("the lifeline never ends otherwise")

    def died_of_memory(self) -> bool:
        """Whether the process, which has died, was close to the limit of its memory."""
        return died_of_memory(self._actor._actor_id.hex(), self.spec.node)

    def answer(self) -> Delivered:
        """What came of the finished task. Raises what `ray.get` raises."""
        gang = self.spec.resources.ranks > 1
        try:
            # Reading the payload tells whether it is still there; where it lies in shared memory that copies nothing.
            payload, reply = ray.get([self.watched, self._reply], timeout=timeouts.FETCH)
        except RayTaskError:
            self.parted = gang
            raise
        if not plain(payload, reply):
            self.parted = gang
            return NOT_BYTES
        state, answer = reply
        self.parted = gang and answer[0] in ("failed", "memory")
        return Delivered(
            payload=self.watched,
            payload_bytes=payload.size,
            state=keep_state(self._reply, state, put_again=self.spec.node != self._recipe.home),
            state_bytes=state.size,
            answer=answer,
        )

    def move(self, node: str) -> None:
        """Has the next actor start on another node."""
        self.spec = replace(self.spec, node=node)

    def ask_to_stop(self) -> None:
        """Makes `is_canceled` true in the actor; a task that does not look at it is killed after the grace."""
        ray.cancel(self.watched)
        self.attempt = None
        self._enter(State.STOPPING, timeouts.STOP_GRACE)

    def ping(self) -> Any:
        """Reference to the actor's pid, node and resources."""
        return self._actor.ping.remote()

    def kill(self) -> None:
        """Ends the actor's process, whatever it is doing; does not wait."""
        if self.processes is not None:
            self.processes.kill()
        self.processes = self._actor = self.watched = self._lifeline = self._reply = self.attempt = None
        self._enter(State.GONE, None)

    def _enter(self, state: State, limit: float | None) -> None:
        self.state = state
        self.since = time.monotonic()
        self.deadline = float("inf") if limit is None else self.since + limit
