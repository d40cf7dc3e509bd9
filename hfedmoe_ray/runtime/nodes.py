"""How busy each machine of the cluster is: the server's own looked at here, each other by one small actor there.

Such an actor holds no resources, imports neither torch nor the rest of this package, and is idle until it is asked,
once a round. It belongs to the server: with the server, or the run, it ends.
"""

from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hfedmoe_ray.records import NodeUsage
from hfedmoe_ray.runtime import cluster, timeouts
from hfedmoe_ray.runtime.usage import UsageMeter

MOST_NODES = 64
"""Machines that are looked at; a larger cluster has tools of its own (Ray's dashboard, Prometheus)."""
_RemoteMeter: Any = ray.remote(num_cpus=0, max_restarts=0)(UsageMeter)


class NodeMeters:
    """Meters of the cluster's machines, those that join later included. Ray must be connected."""

    def __init__(self) -> None:
        """Starts them, without waiting."""
        self._home = ray.get_runtime_context().get_node_id()
        self._own = UsageMeter()
        self._numbers: dict[str, int] = {}
        """By node id, as first seen."""
        self._meters: dict[str, Any] = {}
        """Actor by node id, the server's own node left out."""
        self._asked: dict[str, Any] = {}
        """What they have been asked and have not answered yet."""
        self._names: dict[str, str] = {}
        self._follow_cluster()

    def read(self) -> tuple[NodeUsage, ...]:
        """What they have measured since the last call; who does not answer within a second is heard the next time."""
        self._follow_cluster()
        for node in self._meters.keys() - self._asked.keys():
            self._asked[node] = self._meters[node].read.remote()
        if self._asked:
            ray.wait(list(self._asked.values()), num_returns=len(self._asked), timeout=timeouts.USAGE)
        found = {self._home: self._own.read()}
        for node, asked in list(self._asked.items()):
            try:
                found[node] = ray.get(asked, timeout=0)
            except ray.exceptions.GetTimeoutError:
                continue
            except RayError:  # It died; another is started the next time, if its node is there.
                del self._meters[node]
            del self._asked[node]
        rows = (NodeUsage(node=self._numbers[node], name=self._names[node], **row) for node, row in found.items())
        return tuple(sorted(rows, key=lambda row: row.node))

    def close(self) -> None:
        """Ends the actors."""
        self._own.close()
        for meter in self._meters.values():
            ray.kill(meter)
        self._meters.clear()
        self._asked.clear()

    def _follow_cluster(self) -> None:
        nodes = cluster.capacity()
        self._names |= {node.node: node.name for node in nodes}
        alive = {node.node for node in nodes}
        for node in sorted(alive, key=lambda node: (node != self._home, node)):
            self._numbers.setdefault(node, len(self._numbers))
        for node in self._meters.keys() - alive:
            del self._meters[node]
            self._asked.pop(node, None)
        for node in sorted(alive - self._meters.keys() - {self._home})[: MOST_NODES - 1 - len(self._meters)]:
            here = NodeAffinitySchedulingStrategy(node, soft=False)
            self._meters[node] = _RemoteMeter.options(scheduling_strategy=here).remote()
