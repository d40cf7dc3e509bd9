"""What an experiment will ask for, before anything is started: each client's resources, experts, memory and traffic.

Memory is predicted from what was measured on this machine (`calibration`), else from the model's shape by the formulas
below (ours). It is checked against each tier's `memory_gib`, and the actors are placed on the machine exactly as a run
would place them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from hfedmoe_ray import budget, calibration
from hfedmoe_ray.config.schema import Experiment, Tier
from hfedmoe_ray.config.strategies import ActiveExperts, Flux, Placement
from hfedmoe_ray.data.lengths import Lengths
from hfedmoe_ray.errors import CapacityError
from hfedmoe_ray.packing import GIB, NodeCapacity, ResourceSpec
from hfedmoe_ray.types import ModelShape
from hfedmoe_ray.wire import build_codec

PROCESS_BYTES = 360 * 2**20
"""Own memory of an actor that has imported torch, transformers and DeepSpeed and mapped a model (measured: 325 MiB when
it has just loaded, 340 once it has served a client, 375 after a hundred)."""
PEFT_BYTES = 60 * 2**20
"""What importing peft adds to that (measured); clients do where attention trains by low-rank factors."""
CONTEXT_BYTES = 512 * 2**20
"""What CUDA keeps on a device for each process (typical)."""
DENSE_VECTORS = 24
"""Memory of a token outside experts in a layer, in vectors of H. Autograd keeps 8 for the backward pass (counted: what
enters attention, queries, keys, values, what attention gives, both norms' inputs, what enters the router). The others
are holes (measured on MiniLM, a classifier): blocks below 4 MiB come from the heap, where a temporary that is freed
below something kept leaves a hole, which the C library (glibc 2.36) does not give to an aligned block of the same size.
So larger blocks, and a GPU's allocator, are expected to need less than is told here; that was not measured."""
FROZEN_VECTORS = 14
"""The same in a language model of which experts and routers alone train: maps and norms that are frozen need no input
kept, which leaves 7; the others are holes (measured on SmolLM2-135M)."""
LORA_VECTORS, LORA_ATTENTION_VECTORS = 12, 16
"""What they become more where experts, or attention too, train by low-rank factors: the products of W and of B A, the
second scaled, and their sums. Nearly all are holes (measured; the first with a top-k of `LORA_TOP_K`)."""
LORA_TOP_K = 4
GPU_VECTORS = 10
"""Memory of a token outside adapted experts in a layer in bf16 on a GPU, in vectors of H in fp32 (counted on OLMoE: 9,
and on DeepSeek-V2: 12.8, whose shared experts are among them); experts computed together keep 0.5 H where a token
enters, 0.5 H where it leaves, and 2 F within, in the same unit."""
LOGIT_COPIES = 3
"""Of a response token's logits, a number for each word: themselves, their softmax, and its gradient."""
WRITTEN_SHARE = 0.25
"""Of a language model's tokens, those of responses, whose logits are asked for (assumed)."""
BF16_SHARE = 0.6
"""Of fp32's activations under autocast: norms and residuals stay fp32."""
TRAINED_COPIES = 4
"""Weights, gradients and AdamW's two moments, all fp32."""
BYTES = 4
"""Of an fp32 number."""


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
                    shared_bytes=_frozen_bytes(experiment, shape) if gpu and budget.shares_gpu(tier) else 0,
                    measured=measured and calibration.read(experiment, tier, shape, gpu=gpu) is not None,
                    train_seconds=predict_seconds(experiment, shape, tier, resident, present, gpu=gpu),
                    bytes_down=shape.shared_bytes
                    + present * shape.expert_bytes
                    + _means_bytes(experiment, shape, present)
                    + _profiling_bytes(experiment, shape),
                    bytes_up=predict_upload(experiment, shape, resident, present),
                )
            )
    return tuple(forecasts)


def predict_memory(
    experiment: Experiment,
    shape: ModelShape,
    tier: Tier,
    resident: int,
    present: int,
    *,
    gpu: bool,
    lengths: Lengths | None = None,
) -> int:
    """Returns the predicted peak of a client's own memory in bytes, by measurement where there is one."""
    measured = calibration.read(experiment, tier, shape, gpu=gpu)
    if measured is None:
        return estimate_memory(experiment, shape, tier, resident, present, gpu=gpu, lengths=lengths)
    share = present / shape.total_experts * _activated(experiment, shape, tier)
    examples: float = calibration.examples_at_once(experiment, tier)
    if lengths is not None:
        tokens, _ = lengths.batch(round(examples), _passes(experiment, tier))
        examples = tokens / measured.tokens
    peak = measured.peak.of(resident, share, examples)
    return (0 if gpu else _process_bytes(experiment)) + round(peak)


def estimate_memory(
    experiment: Experiment,
    shape: ModelShape,
    tier: Tier,
    resident: int,
    present: int,
    *,
    gpu: bool,
    lengths: Lengths | None = None,
) -> int:
    """Returns the same by arithmetic: the process, everything that trains `TRAINED_COPIES` times, and activations.

    What is frozen is mapped from a file or the object store and shared by the processes of a node, and so it is on a
    GPU that clients share, but for what travels: of that, and of everything where it has a GPU to itself, a client has
    its own copy there.
    """
    process = CONTEXT_BYTES if gpu else _process_bytes(experiment)
    trained = shape.shared_bytes + resident * shape.expert_bytes
    frozen = (present - resident) * shape.expert_bytes if gpu else 0
    if gpu and not budget.shares_gpu(tier):
        frozen += shape.frozen_bytes + present * shape.base_expert_bytes
    if gpu and _computes_together(experiment, tier):
        frozen += _widened_bytes(experiment, shape)
    activations = _activation_bytes(experiment, shape, tier, present, lengths, gpu=gpu)
    return process + frozen + TRAINED_COPIES * trained + activations


def _computes_together(experiment: Experiment, tier: Tier) -> bool:
    """Whether a client on a GPU computes its experts together (`moe.grouped`)."""
    bf16 = (tier.precision or experiment.local.precision) == "bf16"
    return bf16 and experiment.model.lora is not None


def _widened_bytes(experiment: Experiment, shape: ModelShape) -> int:
    """What a GPU holds of frozen matrices in bf16 while a batch passes.

    Autocast's copies of those outside experts, which the backward pass needs, and of quantised experts the larger
    matrix of a layer's, one layer at a time; int8 in fp32 first.
    """
    lora = experiment.model.lora
    assert lora is not None
    wide = {"exact": 0, "int8": 6, "nf4": 2}[lora.base]
    matrix = shape.experts * shape.dense_expert_bytes // BYTES * 2 // 3
    return (shape.frozen_bytes - shape.table_bytes) // 2 + wide * matrix


def _frozen_bytes(experiment: Experiment, shape: ModelShape) -> int:
    """What a GPU's clients share (`moe.sharing`): all that never trains outside experts, and with LoRA all experts."""
    return shape.frozen_bytes + (shape.total_experts * shape.base_expert_bytes if experiment.model.lora else 0)


def predict_seconds(
    experiment: Experiment, shape: ModelShape, tier: Tier, resident: int, present: int, *, gpu: bool
) -> float | None:
    """Returns the predicted seconds of a client's optimizer steps in a round; None where nothing was measured.

    Ranks share a batch; what they exchange is not counted.
    """
    measured = calibration.read(experiment, tier, shape, gpu=gpu)
    if measured is None:
        return None
    share = present / shape.total_experts * _activated(experiment, shape, tier)
    return experiment.local.steps * measured.step.of(resident, share, ceil(experiment.local.batch_size / tier.ranks))


def predict_upload(experiment: Experiment, shape: ModelShape, resident: int, present: int) -> int:
    """Returns the predicted bytes of an update in which every resident trained, at the configured precision.

    Trained tensors, the routing profile (four float64 of [L, E]) and the mean output of every expert held. With secure
    aggregation, the numbers of a masked vector; keys and letters, some KiB, are left out.
    """
    if (secure := experiment.secure) is not None:
        experts = shape.total_experts if secure.variant == "padded" else resident
        measured = shape.total_experts * (shape.hidden + 3)  # mean outputs, tokens behind them, router weights, usage
        return ((shape.shared_bytes + experts * shape.expert_bytes) // BYTES + measured) * secure.ring // 8
    codec = build_codec(experiment.wire)
    number, mean = (BYTES, BYTES) if codec is None else (codec.bytes_per_number, BYTES // 2)
    trained = shape.shared_bytes + resident * shape.expert_bytes
    return ceil(trained / BYTES * number) + 4 * 8 * shape.total_experts + present * shape.hidden * mean


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


# ------------------------------------------------------------------------------------------------------ predictions


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


def _activated(experiment: Experiment, shape: ModelShape, tier: Tier) -> float:
    """Experts that a token of the tier's clients is routed to, as a multiple of the model's own top-k."""
    if not isinstance(experiment.strategy, ActiveExperts):
        return 1.0
    resident, _ = budget.expert_counts(tier, shape)
    return budget.active_experts(experiment.strategy, resident, shape) / shape.top_k


def _process_bytes(experiment: Experiment) -> int:
    lora = experiment.model.lora
    return PROCESS_BYTES + (PEFT_BYTES if lora and lora.attention else 0)


def _activation_bytes(
    experiment: Experiment, shape: ModelShape, tier: Tier, present: int, lengths: Lengths | None, *, gpu: bool
) -> int:
    """Activations that the backward pass needs, from a transformer block's main tensors, and the heap's holes.

    Per token and MoE layer `DENSE_VECTORS` of H, and those of LoRA, and for each of its top-k experts that is present
    (re-routed tokens find K that are, and merged experts compute for all their members) the input and output (H) and
    two vectors of the expert's inner size F, where an expert is about 2 H F numbers. With activation checkpointing, one
    such layer and the inputs of all.

    The experts' part is an approximation: autograd keeps 3 H + 2 F of a plain expert's token and 3 H + 4 F of a gated
    one's, of about 3 H F numbers, where 2 H + 2 F and 2 H + 3 F are told; but of real tokens, and padding is told too.
    """
    strategy, causal = experiment.strategy, experiment.model.task == "causal"
    computed = isinstance(strategy, Flux) or (isinstance(strategy, Placement) and strategy.unselected == "reroute")
    share = (1.0 if computed else present / shape.total_experts) * _activated(experiment, shape, tier)
    inner = (shape.dense_expert_bytes or shape.expert_bytes) / BYTES / (2 * shape.hidden)
    vectors: float = FROZEN_VECTORS if causal and experiment.model.trainable == "experts" else DENSE_VECTORS
    lora = experiment.model.lora
    if lora:
        # With a decoder each of a token's experts has its own; of the encoder they were measured all together.
        experts = LORA_VECTORS * (shape.top_k / LORA_TOP_K if causal else 1)
        vectors += experts + (LORA_ATTENTION_VECTORS if lora.attention else 0)
    layer = vectors * shape.hidden + share * shape.top_k * 2 * (shape.hidden + inner)
    bf16 = (tier.precision or experiment.local.precision) == "bf16"
    scale = BF16_SHARE if bf16 else 1.0
    if gpu and _computes_together(experiment, tier):
        neurons = shape.dense_expert_bytes / BYTES / (3 * shape.hidden)  # a gated expert is about 3 H F numbers
        layer, scale = GPU_VECTORS * shape.hidden + share * shape.top_k * (shape.hidden + 2 * neurons), 1.0
    per_token = layer + shape.layers * shape.hidden if tier.checkpoint_activations else shape.layers * layer
    examples = calibration.examples_at_once(experiment, tier)
    tokens = float(examples * experiment.data.max_length)
    written = WRITTEN_SHARE * tokens if causal else 0.0
    if lengths is not None:
        tokens, written = lengths.batch(examples, _passes(experiment, tier))
    logits = written * LOGIT_COPIES * shape.vocabulary if causal else 0.0
    return int((tokens * per_token * scale + logits) * BYTES)


def _passes(experiment: Experiment, tier: Tier) -> int:
    """Batches that pass through the model of each of a client's ranks in a round."""
    examples = experiment.local.steps * experiment.local.batch_size / tier.ranks
    return ceil(examples / calibration.examples_at_once(experiment, tier))


def _means_bytes(experiment: Experiment, shape: ModelShape, present: int) -> int:
    """Mean outputs [L, E, H], where they stand in for absent experts."""
    strategy = experiment.strategy
    needed = isinstance(strategy, Placement) and strategy.unselected == "mean" and present < shape.total_experts
    return shape.total_experts * shape.hidden * BYTES if needed else 0


def _profiling_bytes(experiment: Experiment, shape: ModelShape) -> int:
    """What a client fetches to be profiled for its next round: all experts, with Flux in few bits."""
    strategy = experiment.strategy
    if not isinstance(strategy, Flux):
        return 0
    everything = shape.total_experts * shape.expert_bytes
    return shape.shared_bytes + everything // {"exact": 1, "int8": 4, "int4": 8}[strategy.profile]


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
