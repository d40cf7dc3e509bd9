"""What an experiment will ask for, before anything is started: each client's resources, experts, memory and traffic.

Memory is predicted (`estimates`) and checked against each tier's `memory_gib`, and the actors are placed on the machine
exactly as a run would place them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from hfedmoe_ray import budget, calibration
from hfedmoe_ray.config.schema import Experiment, Tier
from hfedmoe_ray.config.strategies import Flux, Placement
from hfedmoe_ray.data.lengths import Lengths
from hfedmoe_ray.errors import CapacityError
from hfedmoe_ray.estimates import (
    estimate_memory,
    frozen_bytes,
    means_bytes,
    predict_memory,
    predict_seconds,
    predict_upload,
    profiling_bytes,
)
from hfedmoe_ray.packing import GIB, NodeCapacity, ResourceSpec
from hfedmoe_ray.types import ModelShape


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What each client of one tier is predicted to need."""

    tier: str
    clients: tuple[int, ...]
    asked: ResourceSpec
    """What Ray is asked for, per client."""
    resident: int
    """Experts held whose weights may train, over all layers."""
    present: int
    """Experts held at all: residents, and frozen copies of the others where the strategy wants them."""
    batch: int
    """Experts that get gradients in one batch, at most."""
    memory_bytes: int
    """Peak of the memory that a client's process has to itself while it trains; on a GPU, of the device's."""
    shared_bytes: int
    """What a GPU holds besides, once for all its clients: the frozen weights, where clients have shares of GPUs."""
    measured: bool
    """Whether that follows from measurements on this machine, or from arithmetic."""
    train_seconds: float | None
    """Of its optimizer steps in a round, by the same measurements; None where there are none."""
    bytes_down: int
    """What a client fetches in a round it takes part in."""
    bytes_up: int
    """What it sends back, at most: every resident trained."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An experiment on some nodes."""

    tiers: tuple[Forecast, ...]
    nodes: tuple[NodeCapacity, ...]
    slots: tuple[budget.SlotSpec, ...]
    """Client actors alive at once; none with `backend: local`."""
    round_down: float
    """Bytes fetched by an average cohort in a round."""
    round_up: float
    """Bytes it sends back, at most."""
    waves: int
    """Turns of the busiest client actor in such a round, were all tasks equally long."""
    seconds: float | None
    """Of the optimizer steps in such a round, at the speed measured on this machine for a process that has a core, or a
    GPU, to itself; None where nothing was measured."""


def plan_experiment(
    experiment: Experiment, shape: ModelShape, nodes: Sequence[NodeCapacity], lengths: Lengths | None = None
) -> Plan:
    """Predicts what every client needs, and places the client actors on the nodes.

    Args:
        experiment: The experiment.
        shape: Of its model.
        nodes: Where it is to run.
        lengths: Of its texts. Default: every text is as long as `data.max_length` allows.

    Raises:
        CapacityError: a tier is predicted to need more than its `memory_gib`, or the actors do not fit the nodes.
    """
    forecasts = forecast(experiment, shape, gpus_available=any(node.gpus for node in nodes), lengths=lengths)
    check_memory(experiment, shape, forecasts, lengths)
    share = experiment.round_size / experiment.clients.count
    slots = budget.plan_actors(experiment, nodes) if experiment.backend == "ray" else ()
    steps = {one.tier: one.train_seconds for one in forecasts}
    return Plan(
        tiers=forecasts,
        nodes=tuple(nodes),
        slots=slots,
        waves=round(_busiest(experiment, slots, dict.fromkeys(steps, 1.0))),
        seconds=_busiest(experiment, slots, {tier: one for tier, one in steps.items() if one is not None})
        if None not in steps.values()
        else None,
        round_down=share * sum(one.bytes_down * len(one.clients) for one in forecasts),
        round_up=share * sum(one.bytes_up * len(one.clients) for one in forecasts),
    )


def _busiest(experiment: Experiment, slots: Sequence[budget.SlotSpec], cost: Mapping[str, float]) -> float:
    """What the busiest actor does in a round of an average cohort, each client going to the idlest that serves it.

    Args:
        experiment: Says how many take part, and of which tiers.
        slots: The actors; none where one process does everything.
        cost: Of a client's task, by tier; the longest start first.
    """
    average = budget.tier_of(experiment.clients.model_copy(update={"count": experiment.round_size}))
    tasks = sorted(((cost[tier.name], tier.name) for tier in average), reverse=True)
    if not slots:
        return sum(one for one, _ in tasks)
    if experiment.actors == "dedicated":
        return tasks[0][0]
    busy = [0.0] * len(slots)
    for one, tier in tasks:
        serving = [number for number, slot in enumerate(slots) if tier in slot.tiers]
        busy[min(serving, key=lambda number: busy[number])] += one
    return max(busy)


def forecast(
    experiment: Experiment,
    shape: ModelShape,
    *,
    gpus_available: bool,
    lengths: Lengths | None = None,
    measured: bool = True,
) -> tuple[Forecast, ...]:
    """Predicts what the clients of every tier that has any need, in the order of the configuration.

    Args:
        experiment: The experiment.
        shape: Of its model.
        gpus_available: Whether clients compute on GPUs.
        lengths: Of its texts. Default: every text is as long as `data.max_length` allows.
        measured: Whether what was measured on this machine counts, where there is something.
    """
    tier_of_client = budget.tier_of(experiment.clients)
    forecasts = []
    for tier in experiment.clients.tiers:
        clients = tuple(client for client, other in enumerate(tier_of_client) if other.name == tier.name)
        resident, present, batch = _experts(experiment, tier, shape)
        asked = budget.resources(tier, gpus_available)
        gpu = asked.num_gpus > 0
        if clients:
            forecasts.append(
                Forecast(
                    tier=tier.name,
                    clients=clients,
                    asked=asked,
                    resident=resident,
                    present=present,
                    batch=batch,
                    memory_bytes=predict_memory(experiment, shape, tier, resident, present, gpu=gpu, lengths=lengths)
                    if measured
                    else estimate_memory(experiment, shape, tier, resident, present, gpu=gpu, lengths=lengths),
                    shared_bytes=frozen_bytes(experiment, shape) if gpu and budget.shares_gpu(tier) else 0,
                    measured=measured and calibration.read(experiment, tier, shape, gpu=gpu) is not None,
                    train_seconds=predict_seconds(experiment, shape, tier, resident, present, gpu=gpu),
                    bytes_down=shape.shared_bytes
                    + present * shape.expert_bytes
                    + means_bytes(experiment, shape, present)
                    + profiling_bytes(experiment, shape),
                    bytes_up=predict_upload(experiment, shape, resident, present),
                )
            )
    return tuple(forecasts)


def check_memory(
    experiment: Experiment, shape: ModelShape, forecasts: Sequence[Forecast], lengths: Lengths | None = None
) -> None:
    """Compares predictions with the tiers' `memory_gib`.

    Raises:
        CapacityError: names the clients that are predicted to need more, and what to change.
    """
    position = {tier.name: number for number, tier in enumerate(experiment.clients.tiers)}
    advice = [
        _memory_advice(experiment, shape, one, position[one.tier], lengths)
        for one in forecasts
        if one.memory_bytes > experiment.clients.tiers[position[one.tier]].memory_gib * GIB
    ]
    if advice:
        raise CapacityError(" ".join(advice))


def _experts(experiment: Experiment, tier: Tier, shape: ModelShape) -> tuple[int, int, int]:
    """(resident, present, batch) of a client of the tier, under the strategy's rules."""
    strategy, everything = experiment.strategy, shape.total_experts
    if isinstance(strategy, Flux):
        room, batch = budget.expert_counts(tier, shape)
        slots, merged = strategy.slots(room, shape.layers, everything)
        return slots, slots + merged, min(slots, batch)
    if not isinstance(strategy, Placement):
        return everything, everything, everything
    resident, batch = budget.expert_counts(tier, shape)
    if strategy.resident == "all":
        return everything, everything, batch
    return resident, everything if strategy.unselected == "frozen" else resident, batch


# ------------------------------------------------------------------------------------------------------------ fit


def _memory_advice(
    experiment: Experiment, shape: ModelShape, one: Forecast, position: int, lengths: Lengths | None
) -> str:
    """Who needs too much, and the two changes that would mend it."""
    tier = experiment.clients.tiers[position]
    key = f"clients.tiers.{position}"
    text = (
        f"{_clients(one.clients)} of tier {one.tier} would need {one.memory_bytes / GIB:.2f} GiB each to train "
        f"{one.resident} experts, but {key}.memory_gib is {tier.memory_gib:g}. Raise it to "
        f"{ceil(one.memory_bytes / GIB * 20) / 20:g}"
    )
    if isinstance(experiment.strategy, Flux):
        return f"{text}, or lower {key}.experts from {tier.experts:g}."
    if not isinstance(experiment.strategy, Placement):
        return f"{text}, or use a strategy with a budget: {experiment.strategy.name} trains every expert."
    if experiment.strategy.resident == "all":
        return f"{text}, or set strategy.resident to budget, so that a client holds only {key}.experts."
    fitting = [
        fewer
        for fewer in range(shape.layers, one.resident)
        if predict_memory(
            experiment,
            shape,
            tier,
            fewer,
            one.present if one.present > one.resident else fewer,
            gpu=one.asked.num_gpus > 0,
            lengths=lengths,
        )
        <= tier.memory_gib * GIB
    ]
    if not fitting:
        return f"{text}; with fewer experts it would not fit either, since most of it does not depend on them."
    share = ceil(max(fitting) / shape.total_experts * 1e4) / 1e4  # rounded up: a share is read as so many whole experts
    return f"{text}, or lower {key}.experts from {tier.experts:g} to {share:g}."


def _clients(numbers: Sequence[int]) -> str:
    """Names a few clients, and how many they are."""
    if len(numbers) == 1:
        return f"Client {numbers[0]}"
    listed = ", ".join(map(str, numbers[:8]))
    return f"Clients {listed}" + (f", … ({len(numbers)} in all)" if len(numbers) > 8 else "")
