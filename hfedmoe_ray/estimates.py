"""What a client will need, as a function of a configuration, a model's shape and how long the texts are.

Memory and time follow from what was measured on this machine (`calibration`); else memory follows from the model's
shape by the formulas below (ours). Torch-free.
"""

from math import ceil

from hfedmoe_ray import budget, calibration
from hfedmoe_ray.config.schema import Experiment, Tier
from hfedmoe_ray.config.strategies import ActiveExperts, Flux, Placement
from hfedmoe_ray.data.lengths import Lengths
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


def frozen_bytes(experiment: Experiment, shape: ModelShape) -> int:
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


def means_bytes(experiment: Experiment, shape: ModelShape, present: int) -> int:
    """Mean outputs [L, E, H], where they stand in for absent experts."""
    strategy = experiment.strategy
    needed = isinstance(strategy, Placement) and strategy.unselected == "mean" and present < shape.total_experts
    return shape.total_experts * shape.hidden * BYTES if needed else 0


def profiling_bytes(experiment: Experiment, shape: ModelShape) -> int:
    """What a client fetches to be profiled for its next round: all experts, with Flux in few bits."""
    strategy = experiment.strategy
    if not isinstance(strategy, Flux):
        return 0
    everything = shape.total_experts * shape.expert_bytes
    return shape.shared_bytes + everything // {"exact": 1, "int8": 4, "int4": 8}[strategy.profile]
