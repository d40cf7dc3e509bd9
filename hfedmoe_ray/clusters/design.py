"""Which nodes an experiment's clients need: one group of equal nodes a tier, one for the server, and the head.

The head carries Ray's bookkeeping and offers nothing. The driver and the server actor, which run the rounds and write
the record, have a node of their own, so that neither a crowded head nor a client can take them along.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, floor

from hfedmoe_ray.budget import tier_demands
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import CapacityError, ConfigError
from hfedmoe_ray.packing import GIB, ResourceSpec

ROLE, TIER = "hfedmoe-role", "hfedmoe-tier"
"""Node labels: `head`, `server` or `client`, and the tier a client node was made for."""
SERVER_RESOURCE = "hfedmoe_server"
"""What the server's node offers besides, for submitters that cannot ask for a label (KubeRay's RayJob)."""
RAY_GIB = 1
"""Memory of a node that Ray's own processes take."""
STORE_SHARE = 0.2
"""Share of a node's memory for Ray's object store: two versions of the weights and a round's updates."""
HEAD_CORES, HEAD_GIB = 2, 4
SERVER_CORES, SERVER_GIB = 2, 6
"""Ours, with room to spare for models of the quickstart's size; a larger model's weights need more."""


@dataclass(frozen=True, kw_only=True)
class NodeGroup:
    """Equal nodes."""

    name: str
    """Letters, digits and dashes: a name in every system the files are for."""
    role: str
    cores: int
    memory_gib: int
    """Of the whole node."""
    client_cpus: int = 0
    """CPUs offered to clients; the server's own work asks for none."""
    client_gib: int = 0
    """Memory offered to clients."""
    gpus: int = 0
    gpu_gib: float = 0.0
    """Memory that the clients sharing one GPU need on it together."""
    store_gib: int = 1
    """Ray's object store, which lies in /dev/shm."""
    minimum: int = 1
    maximum: int = 1
    clients: int = 0
    """Client actors that a node holds at once."""
    labels: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, int] = field(default_factory=dict)
    """Custom resources."""

    @property
    def offered(self) -> dict[str, int]:
        """What Ray is told the node has, as Ray names it (bytes, for memory)."""
        named = {"CPU": self.client_cpus, "GPU": self.gpus, "memory": self.client_gib * GIB}
        return {"CPU": self.client_cpus} | {name: n for name, n in named.items() if n} | dict(self.resources)


@dataclass(frozen=True, kw_only=True)
class ClusterDesign:
    """The nodes of a cluster."""

    head: NodeGroup
    server: NodeGroup
    tiers: tuple[NodeGroup, ...]

    @property
    def workers(self) -> tuple[NodeGroup, ...]:
        """Every group but the head, the server first."""
        return (self.server, *self.tiers)

    @property
    def gpus(self) -> bool:
        """Whether any node has GPUs."""
        return any(group.gpus for group in self.tiers)


def design_cluster(
    experiment: Experiment, *, gpus: bool = False, clients_per_node: int = 4, min_nodes: int = 1
) -> ClusterDesign:
    """Returns nodes on which the experiment's average cohort can train at once.

    Args:
        experiment: Its tiers say what a client asks for, and how many of a round's clients are of which tier.
        gpus: Whether `device` is of a GPU.
        clients_per_node: Client actors that a CPU node is made for, each with a core; a GPU node takes what its GPU
            holds.
        min_nodes: Nodes of each tier that stay when nothing runs, where something scales the cluster.

    Raises:
        ConfigError: two tiers have the same name but for case and punctuation, or an option of a tier fits no node.
    """
    cohort = experiment.clients.model_copy(update={"count": experiment.round_size})
    demands = tier_demands(cohort, gpus)
    names = [_group_name(one.tier) for one in demands]
    if len(set(names)) != len(names):
        raise ConfigError(f"clients.tiers: the names of two tiers become the same name of nodes ({_twice(names)}).")
    return ClusterDesign(
        head=NodeGroup(name="head", role="head", cores=HEAD_CORES, memory_gib=HEAD_GIB, labels={ROLE: "head"}),
        server=NodeGroup(
            name="server",
            role="server",
            cores=SERVER_CORES,
            memory_gib=SERVER_GIB,
            store_gib=_store(SERVER_GIB),
            labels={ROLE: "server"},
            resources={SERVER_RESOURCE: 1},
        ),
        tiers=tuple(
            _tier_group(
                name,
                one.resources,
                {ROLE: "client", TIER: one.tier},
                clients=one.clients,
                per_node=clients_per_node,
                min_nodes=min_nodes,
            )
            for name, one in zip(names, demands, strict=True)
        ),
    )


def _tier_group(
    name: str, asked: ResourceSpec, labels: Mapping[str, str], *, clients: int, per_node: int, min_nodes: int
) -> NodeGroup:
    gpus = ceil(asked.num_gpus)
    sharing = floor(gpus / asked.num_gpus + 1e-9) if gpus else per_node
    held = min(sharing, clients)
    # A GPU's clients mostly wait for it; on a CPU each computes on a core of its own.
    cores = ceil(held * asked.num_cpus) if gpus else held * max(asked.ranks, ceil(asked.num_cpus))
    client_gib = ceil(held * asked.memory_bytes / GIB)
    memory = ceil((client_gib + RAY_GIB) / (1 - STORE_SHARE))
    needed = ceil(clients / held)
    return NodeGroup(
        name=f"tier-{name}",
        role="client",
        cores=max(1, cores),
        memory_gib=memory,
        client_cpus=max(1, cores),
        client_gib=client_gib,
        gpus=gpus,
        gpu_gib=held * asked.memory_bytes / GIB / gpus if gpus else 0.0,
        store_gib=_store(memory),
        minimum=min(min_nodes, needed),
        maximum=needed,
        clients=held,
        labels=dict(labels) | dict(asked.labels),
    )


def _store(memory_gib: int) -> int:
    return max(1, floor(memory_gib * STORE_SHARE))


def _group_name(tier: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", tier.lower()).strip("-")


def _twice(names: Sequence[str]) -> str:
    return next(name for name in names if names.count(name) > 1)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A kind of machine that a cloud rents out."""

    name: str
    cores: int
    memory_gib: int
    gpus: int = 0
    gpu_gib: float = 0.0
    """Memory of each GPU."""


def smallest(machines: Sequence[Machine], group: NodeGroup) -> Machine:
    """The smallest machine that can be a node of the group; a fourteenth of its memory is the operating system's.

    Raises:
        CapacityError: None is large enough.
    """
    fitting = [
        one
        for one in machines
        if one.cores >= group.cores
        and one.memory_gib * 13 / 14 >= group.memory_gib
        and one.gpus >= group.gpus
        and bool(one.gpus) == bool(group.gpus)
        and one.gpu_gib >= group.gpu_gib
    ]
    if not fitting:
        gpus = f", {group.gpus} GPUs with {group.gpu_gib:g} GiB each" if group.gpus else ""
        raise CapacityError(
            f"No machine in the list is large enough for a node of {group.name}: {group.cores} cores, "
            f"{group.memory_gib} GiB{gpus}. Put fewer clients on a node (--clients-per-node), lower the tier's "
            "memory_gib, or write the machine's name into the file by hand."
        )
    return min(fitting, key=lambda one: (one.gpus, one.cores, one.memory_gib))
