"""Whether actors fit a cluster: resources asked for, resources free, and the reason where they do not meet.

Resources are counted in Ray's own unit, a ten-thousandth, so that ten actors of 0.1 device fill one device exactly;
a fraction of a GPU lies on one GPU, never across two.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

GIB = 2**30
UNIT = 10_000
"""Ray counts fractions of a resource in ten-thousandths."""


@dataclass(frozen=True, kw_only=True)
class ResourceSpec:
    """What one client asks of Ray, for all its ranks together."""

    num_cpus: float
    num_gpus: float = 0.0
    memory_bytes: int = 0
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels the node must carry."""
    ranks: int = 1
    """Actors that share it equally, all on one node."""

    @property
    def of_a_rank(self) -> "ResourceSpec":
        """What one of its actors asks for."""
        return ResourceSpec(
            num_cpus=self.num_cpus / self.ranks,
            num_gpus=self.num_gpus / self.ranks,
            memory_bytes=self.memory_bytes // self.ranks,
            labels=self.labels,
        )

    @property
    def bundle(self) -> dict[str, float]:
        """What it asks for, as Ray names it."""
        named = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": float(self.memory_bytes)}
        return {name: amount for name, amount in named.items() if amount}

    def covers(self, other: "ResourceSpec") -> bool:
        """Whether what has these resources can do the work of a client that asks for `other`.

        A result depends on the number of ranks: either has the same, or the client one, which the first can be.
        """
        if other.ranks not in (1, self.ranks):
            return False
        mine, needed = self.of_a_rank, other.of_a_rank
        return (
            _units(mine.num_cpus) >= _units(needed.num_cpus)
            and _units(mine.num_gpus) >= _units(needed.num_gpus)
            and mine.memory_bytes >= needed.memory_bytes
            and needed.labels.items() <= mine.labels.items()
        )

    def joined(self, other: "ResourceSpec") -> "ResourceSpec | None":
        """The smallest resources that cover both, or None where labels or ranks contradict each other."""
        labels, ranks = {**self.labels, **other.labels}, max(self.ranks, other.ranks)
        if not self.labels.items() <= labels.items() or {self.ranks, other.ranks} - {1, ranks}:
            return None
        mine, needed = self.of_a_rank, other.of_a_rank
        return ResourceSpec(
            num_cpus=ranks * max(mine.num_cpus, needed.num_cpus),
            num_gpus=ranks * max(mine.num_gpus, needed.num_gpus),
            memory_bytes=ranks * max(mine.memory_bytes, needed.memory_bytes),
            labels=labels,
            ranks=ranks,
        )

    @property
    def size(self) -> tuple[float, float, int]:
        """Sort key: GPUs, then CPUs, then memory."""
        return (self.num_gpus, self.num_cpus, self.memory_bytes)

    def __str__(self) -> str:
        if self.ranks > 1:
            return f"{self.ranks} ranks of {self.of_a_rank}"
        parts = [f"{self.num_gpus:g} GPU"] if self.num_gpus else []
        parts += [f"{self.num_cpus:g} CPU", f"{self.memory_bytes / GIB:.1f} GiB"]
        return ", ".join(parts + [f"{key}={value}" for key, value in self.labels.items()])


@dataclass(frozen=True, kw_only=True)
class NodeCapacity:
    """What one machine offers to clients."""

    node: str
    """Ray's id of the node."""
    name: str
    """Its address, for people."""
    cpus: float
    gpus: int
    memory_bytes: int
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """Where something was put, so that it can be taken away again."""

    node: str
    asked: ResourceSpec
    gpus: tuple[int, ...]
    """Numbers of the node's GPUs it uses."""


class _Node:
    """What is left of one node, in ten-thousandths; every GPU by itself, because a fraction cannot span two."""

    def __init__(self, capacity: NodeCapacity) -> None:
        self.capacity = capacity
        self.cpus = _units(capacity.cpus)
        self.gpus = [UNIT] * capacity.gpus
        self.memory = capacity.memory_bytes
        self.cores = ceil(capacity.cpus)
        self.busy_cores = 0

    def choose_gpus(self, asked: ResourceSpec) -> tuple[int, ...] | None:
        """GPUs for the request: the fullest that still holds a fraction, or so many free ones."""
        need = _units(asked.num_gpus)
        if need == 0:
            return ()
        if need <= UNIT:
            fitting = [i for i, free in enumerate(self.gpus) if free >= need]
            return (min(fitting, key=lambda i: self.gpus[i]),) if fitting else None
        whole = [i for i, free in enumerate(self.gpus) if free == UNIT][: need // UNIT]
        return tuple(whole) if len(whole) * UNIT == need else None

    def lacks(self, asked: ResourceSpec) -> str | None:
        """Why the request does not fit here, or None where it does."""
        for key, value in asked.labels.items():
            if self.capacity.labels.get(key) != value:
                return f"has no label {key}={value}"
        if self.choose_gpus(asked) is None:
            return f"has {_fractions(self.gpus)} GPU free of {self.capacity.gpus}"
        if self.cpus < _units(asked.num_cpus):
            return f"has {self.cpus / UNIT:g} CPU free of {self.capacity.cpus:g}"
        if self.memory < asked.memory_bytes:
            return f"has {self.memory / GIB:.1f} GiB free of {self.capacity.memory_bytes / GIB:.1f}"
        return None

    def change(self, place: Place, sign: int) -> None:
        asked = place.asked
        self.cpus += sign * _units(asked.num_cpus)
        self.memory += sign * asked.memory_bytes
        self.busy_cores -= sign * _cores(asked)
        for i in place.gpus:
            self.gpus[i] += sign * min(UNIT, _units(asked.num_gpus))


class Packing:
    """The free resources of a cluster while actors are placed on it and taken away."""

    def __init__(self, nodes: Sequence[NodeCapacity], *, spread: bool = True, core_each: bool = False) -> None:
        """Starts empty.

        Args:
            nodes: The cluster.
            spread: Take the node with the least work per core, rather than the first that fits.
            core_each: Refuse CPU actors beyond one per core of a node, even where fractions would fit.
        """
        self._nodes = {capacity.node: _Node(capacity) for capacity in nodes}
        self._spread = spread
        self._core_each = core_each

    def place(self, asked: ResourceSpec) -> Place | None:
        """Takes the resources on some node, or returns None where no node has them."""
        fitting = [node for node in self._nodes.values() if node.lacks(asked) is None]
        if self._core_each:
            fitting = [node for node in fitting if node.busy_cores + _cores(asked) <= node.cores]
        if not fitting:
            return None
        node = min(fitting, key=lambda n: n.busy_cores / max(n.cores, 1)) if self._spread else fitting[0]
        place = Place(node.capacity.node, asked, node.choose_gpus(asked) or ())
        node.change(place, -1)
        return place

    def hold(self, asked: ResourceSpec, node: str) -> Place:
        """Takes the resources on this very node, where they were planned to be."""
        place = Place(node, asked, self._nodes[node].choose_gpus(asked) or ())
        self._nodes[node].change(place, -1)
        return place

    def release(self, place: Place) -> None:
        """Gives back what `place` took."""
        self._nodes[place.node].change(place, 1)

    def obstacles(self, asked: ResourceSpec) -> Iterator[str]:
        """Why the request fits no node: one clause for each node, the emptiest first."""
        for node in sorted(self._nodes.values(), key=lambda n: (max(n.gpus, default=0), n.cpus), reverse=True):
            reason = node.lacks(asked)
            if reason is not None:
                yield f"{node.capacity.name} {reason}"


def _units(amount: float) -> int:
    return round(amount * UNIT)


def _fractions(units: Iterable[int]) -> str:
    return " + ".join(f"{free / UNIT:g}" for free in units) or "0"


def _cores(asked: ResourceSpec) -> int:
    """Cores that CPU actors keep busy, each rank one at least; a GPU actor is limited by its device instead."""
    return 0 if asked.num_gpus else max(asked.ranks, ceil(asked.num_cpus))


def table(rows: Iterable[tuple[str, ResourceSpec]], packing: Packing) -> str:
    """Who cannot be placed, what it asks for, and what every node has instead."""
    cells = [("who", "asks for", "but")]
    cells += [(who, str(asked), "; ".join(_few(list(packing.obstacles(asked))))) for who, asked in rows]
    first, second = (max(len(row[i]) for row in cells) for i in (0, 1))
    return "\n".join(f"  {who:<{first}}  {asked:<{second}}  {why}" for who, asked, why in cells)


def _few(reasons: Sequence[str], shown: int = 3) -> list[str]:
    """At most so many reasons, and how many more there are."""
    more = [f"and {len(reasons) - shown} more nodes"] if len(reasons) > shown else []
    return [*reasons[:shown], *more]
