"""Following a cluster that changes its size: waiting for nodes at the start, and using those that join later."""

import time
from collections.abc import Collection, Sequence

from ray.autoscaler.sdk import request_resources

from hfedmoe_ray.budget import SlotSpec, plan_actors, resources, tier_of
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import CapacityError
from hfedmoe_ray.packing import NodeCapacity, Packing, ResourceSpec
from hfedmoe_ray.runtime import cluster, timeouts
from hfedmoe_ray.runtime.slot import Slot, State


def plan_when_there(experiment: Experiment) -> tuple[SlotSpec, ...]:
    """The actors of a run on this cluster, for whose nodes it waits up to `runtime.scale_up_s`.

    Where that is not 0 the cluster's autoscaler is asked, once, for room for a round's clients all at the same time.
    The run starts as soon as its actors fit; what joins later is used from the next round on (`further_slots`).

    Raises:
        CapacityError: They do not fit, and did not in that time.
    """
    patience = experiment.runtime.scale_up_s
    if patience:
        wanted = _cohort(experiment, gpus=any(node.gpus for node in cluster.capacity()))
        request_resources(
            bundles=[_bundle(one) for one in wanted], bundle_label_selectors=[dict(one.labels) for one in wanted]
        )
    until = time.monotonic() + patience
    while True:
        try:
            return plan_actors(experiment, cluster.capacity())
        except CapacityError as error:
            if time.monotonic() < until:
                time.sleep(timeouts.CLUSTER_POLL)
                continue
            if not patience:
                raise
            raise CapacityError(f"After {patience:g} s (runtime.scale_up_s) still: {error}") from error


def release() -> None:
    """Tells the autoscaler that the room it was asked for is no longer needed."""
    request_resources(bundles=[])


def _cohort(experiment: Experiment, *, gpus: bool) -> list[ResourceSpec]:
    """What the clients of a round ask for, by the shares of their tiers."""
    return [resources(tier, gpus) for tier in tier_of(experiment.clients)[: experiment.clients.asked]]


def _bundle(asked: ResourceSpec) -> dict[str, float]:
    named = {"CPU": asked.num_cpus, "GPU": asked.num_gpus, "memory": float(asked.memory_bytes)}
    return {name: amount for name, amount in named.items() if amount}


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


def _occupied(slots: Sequence[Slot], nodes: Sequence[NodeCapacity]) -> Packing:
    """What living slots leave of these nodes."""
    packing, alive = Packing(nodes), {node.node for node in nodes}
    for slot in slots:
        if slot.state is not State.GONE and slot.spec.node in alive:
            packing.hold(slot.spec.resources, slot.spec.node)
    return packing
