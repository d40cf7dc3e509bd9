"""The simulated clock: seconds that a client's task would take on the device its tier stands for. Simulated, not timed.

A client's round on a device takes

    steps * max(FLOPs / (efficiency * peak), bytes of memory traffic / (efficiency * bandwidth))
    + bytes down / downlink + bytes up / uplink

the roofline of Williams, Waterman and Patterson (CACM 52(4), 2009) for one optimizer step, and the network as a pipe
without latency, one direction after the other. What it leaves out: caches, kernel launches, throttling, sharing.

Bytes are those that were fetched and sent. FLOPs and traffic of a step follow from the model's shape and the client's
plan (ours). With T tokens in a batch, every text taken to fill `data.max_length`; D numbers outside experts and
embedding tables, S of them training; and, were tokens spread evenly over experts, R numbers of the experts that a token
meets, R_t of those that train:

    forward   2 T (D + R)
    backward  2 T (S + R) for what goes down, 2 T (S + R_t) for the weights' gradients

a multiplication and an addition each. Frozen numbers outside experts are passed forward only, and attention's products
of tokens with tokens are left out. Traffic is that of weights alone, each read once forward and once backward, and
eight times its bytes for what trains with AdamW: gradient, two moments and weight, written and read.

Evaluation, and what the server does, take no simulated time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hfedmoe_ray.config.schema import Experiment, Tier
from hfedmoe_ray.records import ClientRecord
from hfedmoe_ray.types import ClientTask, ExpertPlan, ModelShape

EFFICIENCY = 0.3
"""Share of the peak and of the bandwidth that training reaches (ours): every device's seconds scale with it alike."""
MEGABIT = 1e6 / 8
"""Bytes in a megabit."""
BYTES = 4
"""Of an fp32 number."""
READS = 2
"""Times a weight that takes part is read in a step: once forward, once backward."""
TRAINS = 8
"""Times a weight that trains with AdamW is further moved: gradient, two moments and weight, each written and read."""
WAITED_FOR = ("ok", "rejected")
"""How the tasks end whose updates reach the server."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the roofline knows of a device."""

    flops: float
    """Peak fp32 FLOP/s of the processor that would train."""
    bandwidth: float
    """Peak bytes/s of its memory; infinite where it is never what limits."""
    down: float
    """Bytes/s from the server."""
    up: float
    """Bytes/s to the server."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one client does in one round."""

    steps: int
    flops: float
    """Of one optimizer step."""
    traffic: float
    """Bytes between processor and memory in one optimizer step."""
    bytes_down: float
    bytes_up: float


def seconds(device: Device, work: Work, efficiency: float = EFFICIENCY) -> float:
    """Simulated seconds of a client's round on a device."""
    step = max(work.flops / device.flops, work.traffic / device.bandwidth) / efficiency
    return work.steps * step + work.bytes_down / device.down + work.bytes_up / device.up


def device_of(tier: Tier) -> Device | None:
    """The device a tier stands for, if it says so."""
    told = tier.simulated
    if told is None:
        return None
    return Device(
        flops=told.tflops * 1e12,
        bandwidth=math.inf if told.memory_gbps is None else told.memory_gbps * 1e9,
        down=told.down_mbps * MEGABIT,
        up=told.up_mbps * MEGABIT,
    )


# ------------------------------------------------------------------------------------------------- the work of a step


def forward_flops(shape: ModelShape, plan: ExpertPlan) -> float:
    """FLOPs of one token's forward pass: 2 (D + R)."""
    return 2 * (_dense(shape) + _met(shape, plan, _held(plan)) * _numbers(shape))


def training_flops(shape: ModelShape, plan: ExpertPlan) -> float:
    """FLOPs of one token in an optimizer step: 2 (D + R) + 2 (S + R) + 2 (S + R_t)."""
    shared = min(shape.shared_bytes / BYTES, _dense(shape))
    down = _met(shape, plan, _held(plan)) * _numbers(shape)
    gradients = _met(shape, plan, _in_a_batch(plan)) * shape.expert_bytes / BYTES
    return forward_flops(shape, plan) + 2 * (shared + down) + 2 * (shared + gradients)


def weight_bytes(shape: ModelShape, plan: ExpertPlan) -> float:
    """Bytes of all weights that take part: outside experts, where of tables only rows are read, and experts held."""
    return _dense(shape) * BYTES + _held(plan) * (shape.expert_bytes + shape.base_expert_bytes)


def trained_bytes(shape: ModelShape, plan: ExpertPlan) -> float:
    """Bytes of the weights that a step changes, at most."""
    return shape.shared_bytes + _in_a_batch(plan) * shape.expert_bytes


def _dense(shape: ModelShape) -> float:
    """D: numbers outside experts that a token is multiplied with."""
    return (shape.shared_bytes + shape.frozen_bytes - shape.table_bytes) / BYTES


def _numbers(shape: ModelShape) -> float:
    """Of one expert: its own, and with LoRA those of its factors."""
    return (shape.dense_expert_bytes + shape.expert_bytes) / BYTES


def _held(plan: ExpertPlan) -> int:
    return len(plan.present) + len(plan.merged)


def _in_a_batch(plan: ExpertPlan) -> int:
    """Experts that get gradients in one batch, at most."""
    trainable = len(plan.trainable)
    return trainable if plan.batch_budget is None else min(trainable, plan.batch_budget)


def _met(shape: ModelShape, plan: ExpertPlan, experts: int) -> float:
    """How many of some experts a token meets, over all layers, were tokens spread evenly.

    Of a token's top-k those that are absent cost nothing, unless it is routed on to present ones or they are merged.
    """
    chosen = shape.layers * (plan.top_k or shape.top_k)
    spread = _held(plan) if plan.absent in ("reroute", "merge") else shape.total_experts
    return chosen * min(1.0, experts / max(spread, 1))


# --------------------------------------------------------------------------------------------------------- the clock


class Clock:
    """Tells what tasks take on the devices of a run's tiers; nothing where tiers name none."""

    def __init__(self, experiment: Experiment, shape: ModelShape, tiers: Sequence[Tier]) -> None:
        """Takes note of the run: what clients do, with what model, and the tier of every client."""
        self._local = experiment.local
        self._text = experiment.data.max_length
        self._shape = shape
        self._devices = [device_of(tier) for tier in tiers]

    def seconds(self, task: ClientTask, *, samples: int, bytes_down: int, bytes_up: int) -> float | None:
        """Simulated seconds of a task that trains or profiles; None where its client's tier names no device.

        Args:
            task: One client's.
            samples: |D_c|: no batch has more.
            bytes_down: Fetched for it.
            bytes_up: Sent back.
        """
        device = self._devices[task.client]
        if device is None:
            return None
        batch = min(self._local.batch_size, samples)
        weights = weight_bytes(self._shape, task.plan)
        if task.kind == "profile":
            examples = min(self._local.profile_examples, samples)
            steps = math.ceil(examples / batch) if batch else 0
            flops = forward_flops(self._shape, task.plan) * self._text * examples / max(steps, 1)
            traffic = weights
        else:
            steps = self._local.steps
            flops = training_flops(self._shape, task.plan) * self._text * batch
            traffic = READS * weights + TRAINS * trained_bytes(self._shape, task.plan)
        return seconds(
            device, Work(steps=steps, flops=flops, traffic=traffic, bytes_down=bytes_down, bytes_up=bytes_up)
        )

    def elapsed(self, *phases: Sequence[ClientRecord]) -> float | None:
        """Simulated seconds of a round's phases, one after the other; None where tiers name no device.

        A phase lasts until the slowest update is in that reached the server. Who was late, failed or was dropped is not
        waited for; with `clients.over_select` the updates are those that came first here, whatever the devices.
        """
        if None in self._devices:
            return None
        return sum(
            max((r.simulated_seconds or 0.0 for r in records if r.status in WAITED_FOR), default=0.0)
            for records in phases
        )
