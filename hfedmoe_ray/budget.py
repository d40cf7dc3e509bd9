"""A client's compute budget as resources: what Ray is asked for, how many experts fit, and where slots are placed.

Everything here is arithmetic on the configuration and on the capacity of nodes; the same functions answer
`hfedmoe plan` without a cluster and place the actors of a run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import floor
from typing import Literal

from hfedmoe_ray.config.schema import Clients, Experiment, Tier
from hfedmoe_ray.config.strategies import ActiveExperts
from hfedmoe_ray.errors import CapacityError, ConfigError
from hfedmoe_ray.packing import GIB, NodeCapacity, Packing, ResourceSpec, table
from hfedmoe_ray.types import ModelShape

GPU_CLIENT_CPUS = 0.25
"""CPU cores asked for beside a GPU: its process mostly waits for the device, but it has to be scheduled somewhere."""


# ---------------------------------------------------------------------------------------------------- one client


def resources(tier: Tier, gpus_available: bool) -> ResourceSpec:
    """What a client of `tier` asks of Ray.

    `device` is a fraction of a GPU where the cluster has any, and then comes with `GPU_CLIENT_CPUS`; elsewhere it is
    a fraction of a CPU core. `num_gpus` and `num_cpus` override either; `num_gpus: 0` makes a CPU client. A client of
    several whole devices has a rank on each, with the memory of a device and, on GPUs, its own share of the CPUs.

    Raises:
        ConfigError: The tier offloads its optimizer from a GPU that its clients will not have.
    """
    num_gpus = tier.num_gpus if tier.num_gpus is not None else (tier.device if gpus_available else 0.0)
    if tier.offload_optimizer and not num_gpus:
        raise no_gpu_to_offload(tier)
    num_cpus = (
        tier.num_cpus if tier.num_cpus is not None else (GPU_CLIENT_CPUS * tier.ranks if num_gpus else tier.device)
    )
    return ResourceSpec(
        num_cpus=num_cpus,
        num_gpus=num_gpus,
        memory_bytes=tier.ranks * int(tier.memory_gib * GIB),
        labels=dict(tier.labels),
        ranks=tier.ranks,
    )


def shares_gpu(tier: Tier) -> bool:
    """Whether the clients of a tier, where they get GPUs, have less than a whole one each, and share it with others."""
    num_gpus = tier.num_gpus if tier.num_gpus is not None else tier.device
    return 0 < num_gpus < 1


def tier_of(clients: Clients) -> tuple[Tier, ...]:
    """The tier of every client, by client number.

    Counts follow the shares by largest remainder (ties: the tier named first). The tiers are dealt in turn, each
    time to the one that is furthest behind its count, so that any run of consecutive clients holds the tiers in
    proportion: a partition that orders clients, such as shards, then does not give one tier all of some class.
    """
    shares = tuple(tier.share for tier in clients.tiers)
    return tuple(clients.tiers[number] for number in _dealt(shares, clients.count))


@lru_cache(maxsize=8)
def _dealt(shares: tuple[float, ...], clients: int) -> tuple[int, ...]:
    """Which tier every client has, by number (see `tier_of`; kept, since many ask and clients may be very many)."""
    counts = _largest_remainder(shares, clients)
    dealt = [0] * len(counts)
    order: list[int] = []
    for position in range(1, clients + 1):
        lag = [count * position / clients - given for count, given in zip(counts, dealt, strict=True)]
        behind = max((i for i, count in enumerate(counts) if dealt[i] < count), key=lambda i: (lag[i], -i))
        dealt[behind] += 1
        order.append(behind)
    return tuple(order)


def no_gpu_to_offload(tier: Tier) -> ConfigError:
    """The error of a tier that offloads its optimizer where its clients compute on the CPU."""
    return ConfigError(
        f"clients.tiers: tier {tier.name} has `offload_optimizer: true`, which keeps optimizer state in the host's "
        "memory instead of a GPU's, but here its clients compute on the CPU: there is nothing to move. Write "
        "`offload_optimizer: false` and `zero_stage: 0`."
    )


def expert_counts(tier: Tier, shape: ModelShape) -> tuple[int, int]:
    """(resident, batch): experts a client of `tier` holds, and K_c of eq. 15, over all L layers.

    Shares are rounded down; a client holds at least one expert a layer and trains at least one in a batch.
    """
    resident = max(shape.layers, _share_of(tier.experts, shape.total_experts))
    if tier.batch_experts is None:
        return resident, resident
    return resident, min(resident, max(1, _share_of(tier.batch_experts, shape.total_experts)))


def active_experts(strategy: ActiveExperts, resident: int, shape: ModelShape) -> int:
    """Experts a token is routed to on a client that holds every expert: its k.

    Args:
        strategy: Says of how many (E, or the model's own top-k) the client's budget is a share.
        resident: Experts the memory budget stands for, over all layers (`expert_counts`).
        shape: The model's.
    """
    of = shape.experts if strategy.of == "experts" else shape.top_k
    return max(1, floor(resident * of / shape.total_experts + 0.5))


def _share_of(share: float, total: int) -> int:
    """floor(share * total), where 0.3 of 10 is 3 in spite of binary fractions."""
    return floor(share * total + 1e-9)


def _largest_remainder(shares: Sequence[float], total: int) -> list[int]:
    exact = [share * total for share in shares]
    counts = [floor(value + 1e-9) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


# ------------------------------------------------------------------------------------------------- the whole run


@dataclass(frozen=True, kw_only=True)
class TierDemand:
    """What all clients of one tier ask for together."""

    tier: str
    clients: int
    work: float
    """Predicted work of these clients in a round, in any unit common to all tiers."""
    resources: ResourceSpec


@dataclass(frozen=True, kw_only=True)
class SlotSpec:
    """One actor that is to live: its size, its node, and whom it serves."""

    resources: ResourceSpec
    node: str
    tiers: tuple[str, ...]
    """Tiers whose clients it can serve."""
    client: int | None = None
    """The only client it serves (dedicated), or None."""


def tier_demands(clients: Clients, gpus_available: bool) -> tuple[TierDemand, ...]:
    """The demand of every tier that has clients.

    Predicted work is one unit a client: the number of steps and the batch size are the same for all, and top-k
    compute per token hardly depends on how many experts a client holds.
    """
    tiers = [tier.name for tier in tier_of(clients)]
    return tuple(
        TierDemand(
            tier=tier.name,
            clients=tiers.count(tier.name),
            work=float(tiers.count(tier.name)),
            resources=resources(tier, gpus_available),
        )
        for tier in clients.tiers
        if tier.name in tiers
    )


def plan_actors(experiment: Experiment, nodes: Sequence[NodeCapacity]) -> tuple[SlotSpec, ...]:
    """The actors a run would keep on these nodes; `device` is of a GPU where any node has one.

    Raises:
        CapacityError: they do not fit.
    """
    gpus = any(node.gpus for node in nodes)
    if experiment.actors == "pooled":
        return plan_slots(tier_demands(experiment.clients, gpus), nodes, experiment.runtime.slots)
    return plan_dedicated([(tier.name, resources(tier, gpus)) for tier in tier_of(experiment.clients)], nodes)


def plan_slots(
    demands: Sequence[TierDemand], nodes: Sequence[NodeCapacity], slots: int | Literal["auto"]
) -> tuple[SlotSpec, ...]:
    """Places the slots in which pooled clients take turns; any slot also serves every tier whose needs it covers.

    With enough slots every tier has one of its size, and further ones go where most work per slot remains. With fewer
    the large sizes stay and serve the smaller tiers too. "auto" means, for CPU clients, as many slots as have a core
    of their node to themselves; for GPU clients as many as fit; never more than clients, and at least one.

    Raises:
        CapacityError: a tier fits no node, or `slots` are more than fit or fewer than the tiers' labels need.
    """
    _refuse_oversized([(f"tier {one.tier}", one.resources) for one in demands], nodes)
    limit = sum(one.clients for one in demands)
    if slots != "auto":
        limit = min(limit, slots)
    most = min(limit, len(demands))
    tries = [(most, False)]
    if slots == "auto":
        tries = [(n, True) for n in range(most, 0, -1)] + [(n, False) for n in range(1, most + 1)]
    for count, core_each in tries:
        sizes = _sizes(demands, count)
        packing = Packing(nodes, core_each=core_each)
        placed = [(size, packing.place(size.resources)) for size in sizes]
        if sizes and all(place is not None for _, place in placed):
            break
    else:
        raise CapacityError(_too_few_or_many(demands, nodes, most))
    chosen = [(size, place.node) for size, place in placed if place is not None]
    while len(chosen) < limit:
        load = [(size.work / sum(size is other for other, _ in chosen), -i) for i, size in enumerate(sizes)]
        by_load = [sizes[-i] for _, i in sorted(load, reverse=True)]
        extra = next(((size, place.node) for size in by_load if (place := packing.place(size.resources))), None)
        if extra is None:
            break
        chosen.append(extra)
    if slots != "auto" and len(chosen) < limit:
        raise CapacityError(
            f"runtime.slots asks for {slots} client actors at once, but only {len(chosen)} fit. Ask for fewer, or "
            f"write `slots: auto`.\n" + table(((f"tier {s.tiers[0]}", s.resources) for s in sizes), packing)
        )
    return tuple(
        SlotSpec(
            resources=size.resources,
            node=node,
            tiers=tuple(one.tier for one in demands if size.resources.covers(one.resources)),
        )
        for size, node in chosen
    )


def plan_dedicated(clients: Sequence[tuple[str, ResourceSpec]], nodes: Sequence[NodeCapacity]) -> tuple[SlotSpec, ...]:
    """Places one live actor per client, all at once: first fit, largest client first.

    Args:
        clients: (tier, resources) by client number.
        nodes: The cluster.

    Raises:
        CapacityError: with a table of the clients that do not fit and why.
    """
    packing = Packing(nodes, spread=False)
    homeless: dict[tuple[str, str], tuple[ResourceSpec, list[int]]] = {}
    specs: dict[int, SlotSpec] = {}
    by_size = sorted(range(len(clients)), key=lambda c: clients[c][1].size, reverse=True)
    for client in by_size:
        tier, asked = clients[client]
        place = packing.place(asked)
        if place is None:
            homeless.setdefault((tier, str(asked)), (asked, []))[1].append(client)
        else:
            specs[client] = SlotSpec(resources=asked, node=place.node, tiers=(tier,), client=client)
    if homeless:
        count = sum(len(members) for _, members in homeless.values())
        rows = [
            (f"{tier}: client{'s' * (len(members) > 1)} {_ranges(sorted(members))}", asked)
            for (tier, _), (asked, members) in homeless.items()
        ]
        raise CapacityError(
            f"{count} of {len(clients)} clients do not fit beside the others, and `actors: dedicated` keeps every "
            "client alive at once. Write `actors: pooled`, lower the tiers' device or memory_gib, or add nodes.\n"
            + table(rows, packing)
        )
    return tuple(specs[client] for client in range(len(clients)))


# ---------------------------------------------------------------------------------------------------- slot sizes


@dataclass(frozen=True)
class _Size:
    """A slot size and the tiers it was made for."""

    resources: ResourceSpec
    tiers: tuple[str, ...]
    work: float


def _sizes(demands: Sequence[TierDemand], count: int) -> list[_Size]:
    """At most `count` slot sizes that together serve every tier, largest first; empty where labels forbid it."""
    sizes = [_Size(one.resources, (one.tier,), one.work) for one in demands]
    while len(sizes) > count:
        sizes.sort(key=lambda size: size.resources.size, reverse=True)
        pair = _covered_pair(sizes) or _joinable_pair(sizes)
        if pair is None:
            return []
        small, large, both = pair
        merged = _Size(both, large.tiers + small.tiers, large.work + small.work)
        sizes = [size for size in sizes if size is not small and size is not large] + [merged]
    return sorted(sizes, key=lambda size: size.resources.size, reverse=True)


def _covered_pair(sizes: Sequence[_Size]) -> tuple[_Size, _Size, ResourceSpec] | None:
    """The smallest size that another covers, with the smallest that does."""
    for small in reversed(sizes):
        for large in reversed(sizes):
            if large is not small and large.resources.covers(small.resources):
                return small, large, large.resources
    return None


def _joinable_pair(sizes: Sequence[_Size]) -> tuple[_Size, _Size, ResourceSpec] | None:
    """The smallest size whose labels agree with another's, to be enlarged to both."""
    for small in reversed(sizes):
        for large in reversed(sizes):
            if large is not small and (both := large.resources.joined(small.resources)) is not None:
                return small, large, both
    return None


# --------------------------------------------------------------------------------------------------------- messages


def _refuse_oversized(rows: Sequence[tuple[str, ResourceSpec]], nodes: Sequence[NodeCapacity]) -> None:
    """Raises CapacityError where something does not even fit an empty cluster."""
    empty = Packing(nodes)
    bad = [(who, asked) for who, asked in rows if len(list(empty.obstacles(asked))) == len(nodes)]
    if bad:
        raise CapacityError(
            "No node of the cluster can hold a client of every tier. Lower what these tiers ask for (device, "
            "num_cpus, num_gpus, memory_gib, labels), or add nodes.\n" + table(bad, empty)
        )


def _too_few_or_many(demands: Sequence[TierDemand], nodes: Sequence[NodeCapacity], most: int) -> str:
    if not _sizes(demands, most):
        need = next(n for n in range(most + 1, len(demands) + 1) if _sizes(demands, n))
        return (
            f"{most} client actors at once cannot serve tiers whose labels, or numbers of whole devices, contradict "
            f"each other: these tiers need at least {need}. Raise runtime.slots or clients.count."
        )
    packing = Packing(nodes)
    left = [size for size in _sizes(demands, most) if packing.place(size.resources) is None]
    return (
        "The client actors do not fit the cluster beside each other. Lower runtime.slots or what these tiers ask for, "
        "or add nodes.\n" + table(((f"tier {size.tiers[0]}", size.resources) for size in left), packing)
    )


def _ranges(numbers: Sequence[int]) -> str:
    """[1, 2, 3, 7] as "1-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
