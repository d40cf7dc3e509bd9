"""The processes of a client: one actor, or of a client of several whole devices a gang, one actor on each.

The first actor of a gang, its leader, answers the pool as a single client's does and hands its tasks on to the others.
All are on the slot's node, in a placement group of their own, and live and die together: where one is lost the leader's
task ends with an error, its `live` too, and the pool replaces them all.
"""

import os
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from hfedmoe_ray.budget import SlotSpec
from hfedmoe_ray.context import RunContext
from hfedmoe_ray.errors import ClusterError
from hfedmoe_ray.runtime import timeouts
from hfedmoe_ray.runtime.client import NOTHING, ClientActor, Loading, RemoteClient, Reply, answered
from hfedmoe_ray.runtime.transfer import Directory
from hfedmoe_ray.runtime.weights import TaskRefs
from hfedmoe_ray.runtime.worker import Worker, WorkerFactory, last_line, out_of_memory
from hfedmoe_ray.train.environment import ENVIRONMENT
from hfedmoe_ray.types import Array, ClientTask, TaskWeights

if TYPE_CHECKING:
    from hfedmoe_ray.train.ranks import JoinedRanks

SHARED_KINDS = ("train", "personalise")
"""Tasks with optimizer steps; the others a leader does by itself."""


class RankedWorker(Worker, Protocol):
    """A worker that can be one of several ranks: see `train.local.ClientWorker`."""

    def join(self, ranks: Any) -> None:
        """Makes this worker one of `train.ranks.JoinedRanks`."""

    def follow(self, task: ClientTask, weights: TaskWeights) -> None:
        """Takes a further rank's part in a task."""


class Follower(ClientActor):
    """A rank of a gang that is not its first."""

    _worker: RankedWorker | None

    def join(self, port: int, rank: int, size: int) -> None:
        """Joins the leader, whose store is at a port of this machine; returns when all ranks are there."""
        from hfedmoe_ray.train.ranks import JoinedRanks, reach_store

        assert self._worker is not None, "join before load"
        self._ranks = JoinedRanks(reach_store(port, timeouts.GANG_JOIN), rank, size, timeouts.GANG_STEP)
        self._worker.join(self._ranks)

    def follow(self, task: ClientTask, refs: TaskRefs) -> None:
        """Takes this rank's part in a task.

        Where it cannot, it leaves word of why and ends this process: nothing else shows at once to ranks that wait for
        it, and out of step with them it is of no more use.
        """
        from hfedmoe_ray.train.local import Stopped
        from hfedmoe_ray.train.ranks import caused_by_another_rank

        assert self._worker is not None, "follow before load"
        try:
            with self._spare.working():
                self._worker.follow(task, refs.fetch())
        except Stopped:
            return
        except Exception as error:
            if not isinstance(error, RayError) and not caused_by_another_rank(error):
                self._ranks.fail("".join(traceback.format_exception(error)))
            os._exit(1)


class Leader(ClientActor):
    """The first rank of a gang."""

    _worker: RankedWorker | None

    def __init__(
        self,
        context: RunContext,
        worker_factory: WorkerFactory,
        gpu_share: float,
        followers: Sequence[Any],
        shared: frozenset[int],
    ) -> None:
        """Takes note of the run and of the gang.

        Args:
            context: See `ClientActor`.
            worker_factory: See `ClientActor`.
            gpu_share: See `ClientActor`.
            followers: The other ranks.
            shared: Clients that run as a gang; others that this slot serves run on the leader alone.
        """
        super().__init__(context, worker_factory, gpu_share)
        self._followers = tuple(followers)
        self._shared = shared

    def load(self, directories: Mapping[str, Directory], holder: Any = None) -> Loading:
        """Loads on every rank, and has them join; see `ClientActor.load`."""
        from hfedmoe_ray.train.ranks import JoinedRanks, open_store

        # Files that the node lacks are written once: the others look for them when they are there.
        early = [] if directories else self._loads(directories)
        loading = super().load(directories, holder)
        if loading.missing:
            return loading
        ray.get(early or self._loads(directories), timeout=timeouts.CLIENT_START)
        assert self._worker is not None
        size = len(self._followers) + 1
        store, port = open_store(timeouts.GANG_JOIN)
        joining = [one.join.remote(port, rank, size) for rank, one in enumerate(self._followers, 1)]
        self._ranks = JoinedRanks(store, 0, size, timeouts.GANG_STEP)
        self._worker.join(self._ranks)
        ray.get(joining, timeout=timeouts.GANG_JOIN)
        return loading

    def _loads(self, directories: Mapping[str, Directory]) -> list[Any]:
        return [one.load.remote(directories) for one in self._followers]

    def _execute(self, task: ClientTask, refs: TaskRefs) -> tuple[Array, Reply]:
        """Runs one task, with the others where its client is a gang. See `ClientActor.execute`.

        The answers "failed" and "memory" leave the ranks apart: the gang is of no more use.

        Raises:
            RayError: A rank is lost.
            RuntimeError: A rank is silent.
        """
        if task.client not in self._shared or task.kind not in SHARED_KINDS:
            return super()._execute(task, refs)
        from hfedmoe_ray.train.local import Stopped

        assert self._worker is not None, "execute before load"
        canceled = ray.get_runtime_context().is_canceled
        following = [one.follow.remote(task, refs) for one in self._followers]
        try:
            done = self._worker.execute(task, refs.fetch(), canceled)
            ray.get(following, timeout=timeouts.GANG_STEP)
        except Stopped as error:
            # All ranks have agreed to it, between two steps.
            return NOTHING, (NOTHING, ("stopped", b"", last_line(error)))
        except Exception as error:
            if canceled():
                # Nobody would read the answer of a task that was to stop, nor learn from it that this gang is done.
                os._exit(1)
            told = _first_cause(error, self._ranks, following)
            status: Literal["failed", "memory"] = "memory" if out_of_memory(error) else "failed"
            return NOTHING, (NOTHING, (status, told.encode(), told.strip().splitlines()[-1]))
        return answered(done)

    @ray.method(concurrency_group="lifeline")
    def live(self) -> None:
        """Does not return; raises ClusterError when another rank dies. See `ClientActor.live`."""
        lifelines = [one.live.remote() for one in self._followers]
        ended: list[Any] = []
        while not ended:
            ended, _ = ray.wait(lifelines, num_returns=1, timeout=timeouts.LIFELINE_POLL)
        try:
            ray.get(ended, timeout=timeouts.FETCH)
        except RayActorError as error:
            raise _lost(error) from error


def _lost(error: RayActorError) -> ClusterError:
    return ClusterError(f"Another rank of its gang is lost: {str(error).splitlines()[0]}")


def _first_cause(error: Exception, ranks: "JoinedRanks", following: Sequence[Any]) -> str:
    """Returns the traceback of the code that failed, on whichever rank, when a leader's task has ended with `error`.

    Raises:
        ClusterError: Another rank is lost.
        RuntimeError: `error` itself, where no rank's own code has failed: one was silent.
    """
    from hfedmoe_ray.train.ranks import caused_by_another_rank

    if not isinstance(error, RayError) and not caused_by_another_rank(error):
        return "".join(traceback.format_exception(error))
    if told := ranks.failure():
        return told
    for one in following:
        try:
            ray.get(one, timeout=timeouts.GANG_LAST_WORDS)
        except RayActorError as lost:
            raise _lost(lost) from lost
        except GetTimeoutError:
            continue
    raise error


_RANK = {"max_restarts": 0, "max_task_retries": 0, "concurrency_groups": {"health": 1, "lifeline": 1}}
RemoteLeader: Any = ray.remote(**_RANK)(Leader)
RemoteFollower: Any = ray.remote(**_RANK)(Follower)


@dataclass(frozen=True)
class Processes:
    """What lives in a slot."""

    leader: Any
    """Serves tasks."""
    followers: tuple[Any, ...] = ()
    group: PlacementGroup | None = None

    def kill(self) -> None:
        """Ends all of them, whatever they are doing, and gives their room back; does not wait."""
        for one in (self.leader, *self.followers):
            ray.kill(one)
        if self.group is not None:
            ray.util.remove_placement_group(self.group)


def start_processes(
    spec: SlotSpec,
    context: RunContext,
    worker_factory: WorkerFactory,
    shared: frozenset[int],
    *,
    queue: bool,
    **named: str,
) -> Processes:
    """Creates a slot's actors on its node, a gang where its resources are several ranks'; does not wait.

    Args:
        spec: Of the slot.
        context: The run.
        worker_factory: Makes the actors' workers.
        shared: Clients that run as a gang.
        queue: Have a single actor, too, wait for room in a placement group, which tells when there is some (`room`).
        named: The first actor's `name` and `namespace`.
    """
    environment = {"runtime_env": {"env_vars": ENVIRONMENT}}
    ranks, one = spec.resources.ranks, spec.resources.of_a_rank
    asked = {"num_cpus": one.num_cpus, "num_gpus": one.num_gpus, "memory": one.memory_bytes} | environment
    if ranks == 1 and not queue:
        # The node was planned: left to Ray, fragments of several nodes could add up to a place that is none.
        here = NodeAffinitySchedulingStrategy(spec.node, soft=False)
        made = RemoteClient.options(scheduling_strategy=here, **asked, **named)
        return Processes(made.remote(context, worker_factory, one.num_gpus))
    group = ray.util.placement_group(
        [one.bundle] * ranks, strategy="STRICT_PACK", bundle_label_selector=[{"ray.io/node-id": spec.node}] * ranks
    )
    places = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank) for rank in range(ranks)]
    if ranks == 1:
        made = RemoteClient.options(scheduling_strategy=places[0], **asked, **named)
        return Processes(made.remote(context, worker_factory, one.num_gpus), (), group)
    followers = tuple(
        RemoteFollower.options(scheduling_strategy=place, **asked).remote(context, worker_factory, one.num_gpus)
        for place in places[1:]
    )
    leader = RemoteLeader.options(scheduling_strategy=places[0], **asked, **named)
    return Processes(leader.remote(context, worker_factory, one.num_gpus, followers, shared), followers, group)
