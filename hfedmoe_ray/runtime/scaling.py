"""Following a cluster that changes its size: waiting for nodes at the start, and using those that join later."""

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ray.autoscaler.sdk import request_resources

from hfedmoe_ray.budget import SlotSpec, plan_actors, resources, tier_of
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import CapacityError, ClusterError
from hfedmoe_ray.federation.executor import Notify
from hfedmoe_ray.packing import NodeCapacity, Packing, ResourceSpec
from hfedmoe_ray.runtime import cluster, timeouts
from hfedmoe_ray.runtime.slot import Attempt, Slot, State


def quietly(_name: str, _fields: Mapping[str, Any]) -> None:
    """Tells nobody."""


def plan_when_there(experiment: Experiment, notify: Notify = quietly) -> tuple[SlotSpec, ...]:
    """The actors of a run on this cluster, for whose nodes it waits up to `runtime.scale_up_s`, and tells so.

    Where that is not 0 the cluster's autoscaler is asked, once, for room for a round's clients all at the same time.
    The run starts as soon as its actors fit; what joins later is used from the next round on (`further_slots`).

    Raises:
        CapacityError: They do not fit, and did not in that time.
    """
    patience = experiment.runtime.scale_up_s
    if patience:
        wanted = _cohort(experiment, gpus=any(node.gpus for node in cluster.capacity()))
        request_resources(
            bundles=[one.bundle for one in wanted], bundle_label_selectors=[dict(one.labels) for one in wanted]
        )
    told, until = False, time.monotonic() + patience
    while True:
        try:
            return plan_actors(experiment, cluster.capacity())
        except CapacityError as error:
            if time.monotonic() < until:
                if not told:
                    told = True
                    notify("waiting", {"message": "for nodes on which the clients fit", "seconds": patience})
                time.sleep(timeouts.CLUSTER_POLL)
                continue
            if not patience:
                raise
            release()
            raise CapacityError(f"After {patience:g} s (runtime.scale_up_s) still: {error}") from error


def release() -> None:
    """Tells the autoscaler that the room it was asked for is no longer needed."""
    request_resources(bundles=[])


def _cohort(experiment: Experiment, *, gpus: bool) -> list[ResourceSpec]:
    """What the clients of a round ask for, by the shares of their tiers."""
    return [resources(tier, gpus) for tier in tier_of(experiment.clients)[: experiment.clients.asked]]


def free_room(slot: Slot, slots: Sequence[Slot], nodes: Sequence[NodeCapacity]) -> str | None:
    """A node that has room for this slot beside all others."""
    place = _occupied([one for one in slots if one is not slot], nodes).place(slot.spec.resources)
    return place.node if place else None


def further_slots(
    experiment: Experiment, slots: Sequence[Slot], nodes: Sequence[NodeCapacity], joined: Collection[str]
) -> list[SlotSpec]:
    """What a plan for the cluster as it is now would put on the nodes that joined, beside the slots there are.

    Args:
        experiment: Of the run; dedicated clients have their actors already.
        slots: Those there are, GONE ones included.
        nodes: The cluster now.
        joined: Ids of the nodes that were not there before.
    """
    if experiment.actors != "pooled":
        return []
    try:
        planned = plan_actors(experiment, nodes)
    except CapacityError:
        # Nodes were lost as well, and a plan from scratch fits no longer; the slots that live on go on living.
        return []
    room = {node.node: _occupied(slots, [node]) for node in nodes if node.node in joined}
    missing = len(planned) - sum(slot.state is not State.GONE for slot in slots)
    fitting = (one for one in planned if one.node in room and room[one.node].place(one.resources) is not None)
    return [one for _, one in zip(range(missing), fitting, strict=False)]


class Stranded:
    """Tasks left without any slot, because their nodes are lost, and how long nodes that may join are waited for."""

    def __init__(self, scale_up_s: float) -> None:
        """Starts without any; `scale_up_s` is the run's."""
        self._patience = scale_up_s
        self._since: float | None = None

    def wait(self, slots: Sequence[Slot], ready: Sequence[Attempt], last_loss: str, notify: Notify) -> bool:
        """Returns whether a task has no slot but may get one from a node that joins; tells of every such wait once.

        Args:
            slots: The pool's.
            ready: Tasks that wait for a slot.
            last_loss: Why a slot was lost last.
            notify: Told of the wait.

        Raises:
            ClusterError: none of its nodes was lost, or no other has joined within `runtime.scale_up_s`.
        """
        alive = [slot for slot in slots if slot.state is not State.GONE]
        left = (attempt.task for attempt in ready) if len(alive) < len(slots) else ()
        task = next((task for task in left if not any(slot.serves(task) for slot in alive)), None)
        if task is None:
            self._since = None
            return False
        began, now = self._since is None, time.monotonic()
        since = self._since = now if self._since is None else self._since
        nodes = {node.node for node in cluster.capacity()}
        lost = any(slot.spec.node not in nodes for slot in slots if slot.serves(task))
        why = f"the last was lost because: {last_loss.rstrip('.')}."
        if not lost or now - since >= self._patience:
            waited = f"after {self._patience:g} s (runtime.scale_up_s) " if lost and self._patience else ""
            raise ClusterError(
                f"No actor is {waited}left that could serve client {task.client}; {why} "
                "The last checkpoint is complete: mend the cluster and `hfedmoe resume`."
            )
        if began:
            message = f"for a node with an actor that could serve client {task.client}; {why}"
            notify("waiting", {"message": message, "seconds": self._patience})
        return True


def _occupied(slots: Sequence[Slot], nodes: Sequence[NodeCapacity]) -> Packing:
    """What living slots leave of these nodes."""
    packing, alive = Packing(nodes), {node.node for node in nodes}
    for slot in slots:
        if slot.state is not State.GONE and slot.spec.node in alive:
            packing.hold(slot.spec.resources, slot.spec.node)
    return packing
