"""Room that other work on the cluster holds: which actors have to queue for theirs, and what they wait for.

Ray does not say whether an actor that is not there yet waits for resources or for its process to start. Of a placement
group it does: so an actor for which a look at its node finds no room is queued with a group (`gang.start_processes`).
"""

import time
from collections import Counter
from collections.abc import Sequence

from ray._private.state import available_resources_per_node

from hfedmoe_ray.budget import SlotSpec
from hfedmoe_ray.errors import CapacityError
from hfedmoe_ray.federation.executor import Notify
from hfedmoe_ray.packing import GIB, UNIT
from hfedmoe_ray.runtime import cluster, timeouts
from hfedmoe_ray.runtime.slot import Attempt, Slot, State

_SHOWN = 3
"""Kinds of waiting actors that are told of; there is one for each size and node."""


class FreeRoom:
    """What every node had free when this was made, less what has been taken of it."""

    def __init__(self) -> None:
        """Looks at the cluster."""
        self._left = {node: dict(free) for node, free in available_resources_per_node().items()}

    def take(self, spec: SlotSpec) -> bool:
        """Takes what a slot asks for on its node; returns whether it was there."""
        left, asked = self._left.get(spec.node, {}), spec.resources.bundle
        if any(left.get(name, 0.0) < amount - 0.5 / UNIT for name, amount in asked.items()):
            return False
        for name, amount in asked.items():
            left[name] -= amount
        return True


class Queue:
    """Slots of a pool that are queued, and how long clients may wait for them."""

    def __init__(self, scale_up_s: float) -> None:
        """Starts with nothing to tell; `scale_up_s` is the run's."""
        self._patience = max(timeouts.ROOM, scale_up_s)
        self._next_look = 0.0
        self._told = False

    def look(self, slots: Sequence[Slot]) -> list[Slot]:
        """Lets those start that have room now, where a look is due; returns those whose node is lost."""
        queued = [slot for slot in slots if slot.queued]
        if not queued or time.monotonic() < self._next_look:
            return []
        self._next_look = time.monotonic() + timeouts.CLUSTER_POLL
        nodes = {node.node for node in cluster.capacity()}
        for slot in queued:
            slot.look_for_room()
        return [slot for slot in queued if slot.queued and slot.spec.node not in nodes]

    def goes_on(self, slots: Sequence[Slot], ready: Sequence[Attempt], notify: Notify) -> bool:
        """Returns whether any slot is queued, and tells once when that takes long.

        Clients that other slots serve as well do not mind.

        Raises:
            CapacityError: a task is left all of whose slots have been queued for too long.
        """
        now, queued = time.monotonic(), [slot for slot in slots if slot.queued]
        if not queued:
            self._told = False
            return False
        if not self._told and any(now - slot.since >= timeouts.ROOM_TOLD for slot in queued):
            self._told = True
            message = f"for room that other work on the cluster holds; wanted: {what_is_waited_for(queued)}"
            notify("waiting", {"message": message, "seconds": self._patience})
        spent = {slot for slot in queued if now - slot.since >= self._patience}
        for attempt in ready if spent else ():
            serving = [slot for slot in slots if slot.state is not State.GONE and slot.serves(attempt.task)]
            if serving and spent.issuperset(serving):
                raise CapacityError(
                    f"No actor that could serve client {attempt.task.client} got room within {self._patience:g} s: "
                    f"other work on the cluster holds it. Wanted: {what_is_waited_for(serving)}. Let that work end "
                    "first, lower what the tiers ask for, or wait for longer (runtime.scale_up_s)."
                )
        return True


def what_is_waited_for(queued: Sequence[Slot]) -> str:
    """What some queued slots ask for, and what is free where they are to be, in one line."""
    free, names = available_resources_per_node(), {node.node: node.name for node in cluster.capacity()}
    kinds = Counter((str(slot.spec.resources), slot.spec.node) for slot in queued).most_common()
    words = [
        f"{count} x ({asked}) on {names.get(node, 'a lost node')}, which has {_amounts(free.get(node, {}))} free"
        for (asked, node), count in kinds[:_SHOWN]
    ]
    more = [f"and {len(kinds) - _SHOWN} further sizes or nodes"] if len(kinds) > _SHOWN else []
    return "; ".join([*words, *more])


def _amounts(free: dict[str, float]) -> str:
    gpus = [f"{free['GPU']:g} GPU"] if "GPU" in free else []
    return ", ".join([*gpus, f"{free.get('CPU', 0.0):g} CPU", f"{free.get('memory', 0.0) / GIB:.1f} GiB"])
