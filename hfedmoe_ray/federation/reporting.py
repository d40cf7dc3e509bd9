"""Turning what happened in a round into what people are told: records, reports, facts, summary. Pure functions."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import numpy as np

from hfedmoe_ray import budget
from hfedmoe_ray.config.schema import Tier
from hfedmoe_ray.context import RunContext
from hfedmoe_ray.data.lengths import typical_lengths
from hfedmoe_ray.estimates import CONTEXT_BYTES
from hfedmoe_ray.federation.evaluation import Evaluation, mean_accuracy, variance, worst_tenth
from hfedmoe_ray.federation.state import FederationState, model_sha256
from hfedmoe_ray.moe import derived
from hfedmoe_ray.plan import forecast
from hfedmoe_ray.records import ClientRecord, NodeUsage, RoundReport
from hfedmoe_ray.trust.attacks import hostile_clients
from hfedmoe_ray.types import (
    ClientTask,
    ClientUpdate,
    ExpertKey,
    FloatArray,
    RoutingProfile,
    TaskResult,
    Weights,
)

_PACKAGES = ("torch", "ray", "deepspeed", "transformers", "peft", "datasets", "wandb", "numpy")
_STATUSES = ("ok", "late", "failed", "memory", "rejected", "dropped")


def published_bytes(weights: Weights, task: ClientTask) -> int:
    """Returns the bytes of the arrays a client fetches for a task: shared ones, present experts, means if needed.

    Of experts that are merged it fetches what they are merged into, and no member; of FROZEN ones in few bits those.
    What is private to the client (`ClientTask.personal`, `ClientTask.state`) lies with it and is not counted.
    """
    own = None if task.personal is None else (weights.personal or {}).get(task.personal)
    arrays = [array for name, array in weights.shared.items() if own is None or name not in own.shared]
    quantised = 0
    for key in task.plan.present:
        if own is not None and key in own.experts:
            continue
        bits = derived.bits_of(task.plan, key)
        if bits is None:
            arrays += weights.experts[key].values()
        else:
            quantised += derived.quantised_bytes(weights.experts[key], bits)
    for merged in task.plan.merged:
        arrays += weights.experts[merged.keys[0]].values()  # a mean of experts has the size of one
    if task.plan.needs_means and weights.means is not None:
        arrays.append(weights.means)
    return quantised + sum(array.nbytes for array in arrays)


def client_record(result: TaskResult, tier: Tier, update: ClientUpdate | None, weights: Weights) -> ClientRecord:
    """Returns how one client fared in a round."""
    metrics = result.metrics
    peak = metrics.peak_mib if metrics else 0.0
    return ClientRecord(
        round=result.task.round,
        client=result.task.client,
        tier=tier.name,
        status=result.status,
        kind=result.task.kind,
        reason=result.reason,
        attempts=result.attempts,
        demotions=result.demotions,
        samples=metrics.samples if metrics else 0,
        tokens=metrics.tokens if metrics else 0,
        loss=metrics.loss if metrics and math.isfinite(metrics.loss) else None,
        resident=len(result.task.plan.present) + len(result.task.plan.merged),
        trained=len(update.trained) if update else 0,
        bytes_up=update.payload_bytes if update else 0,
        bytes_down=published_bytes(weights, result.task),
        seconds=metrics.seconds if metrics else 0.0,
        step_seconds=metrics.step_seconds if metrics else 0.0,
        peak_mib=peak,
        over_mib=max(0.0, peak - tier.memory_gib * 1024),
    )


def over_memory(record: ClientRecord, tier: Tier) -> dict[str, Any]:
    """Returns the event of a client that used more memory than its tier's devices have."""
    reason = (
        f"used {record.peak_mib:.0f} MiB at its peak, but {tier.name}'s memory_gib is {tier.memory_gib:g}: on such a "
        "device it would have failed. Raise it, lower the tier's experts or micro_batch, or set checkpoint_activations"
    )
    return {"round": record.round, "client": record.client, "reason": reason}


def mean_profile(profiles: Sequence[RoutingProfile]) -> RoutingProfile | None:
    """Returns the token-weighted mean of profiles (None for none): what the cohort routes like."""
    tokens = sum(profile.tokens for profile in profiles)
    if not tokens:
        return None

    def mean(field: str) -> FloatArray:
        total: FloatArray = sum(getattr(profile, field) * (profile.tokens / tokens) for profile in profiles)
        return total

    return RoutingProfile(
        usage=mean("usage"), specific=mean("specific"), kl=mean("kl"), routed=mean("routed"), tokens=tokens
    )


def agreement(profiles: Sequence[RoutingProfile]) -> float | None:
    """Mean Jensen-Shannon divergence between each client's usage and the cohort's, over layers, in nats (ours)."""
    if not profiles:
        return None
    usage = np.stack([profile.usage for profile in profiles])  # [C, L, E], each row a distribution over experts
    divergence = _entropy(usage.mean(axis=0)) - _entropy(usage).mean(axis=0)  # [L]
    return float(max(divergence.mean(), 0.0))


def _entropy(usage: FloatArray) -> FloatArray:
    share = usage / usage.sum(axis=-1, keepdims=True)
    logs = np.log(share, out=np.zeros_like(share), where=share > 0)
    entropy: FloatArray = -(share * logs).sum(axis=-1)
    return entropy


def round_report(
    round: int,
    records: Sequence[ClientRecord],
    updates: Mapping[int, ClientUpdate],
    *,
    shape: tuple[int, int],
    seconds: float,
    phases: Mapping[str, float],
    participation: float | None,
    simulated: float | None,
    ahead: Sequence[ClientRecord] = (),
    nodes: Sequence[NodeUsage] = (),
) -> RoundReport:
    """Returns the report of a round that is not evaluated yet (`with_evaluation`) from its parts.

    Of what was done ahead for the next one, the bytes count here.
    """
    selected = Counter(key for update in updates.values() for key in update.trained)
    profiles = [update.profile for update in updates.values() if update.profile is not None]
    cohort = mean_profile(profiles)
    layers, experts = shape
    usage = cohort.usage if cohort else np.zeros(shape)
    losses = [record.loss for record in records if record.client in updates and record.loss is not None]
    return RoundReport(
        round=round,
        loss=sum(losses) / len(losses) if losses else None,
        accuracy=None,
        test_loss=None,
        own_accuracy=None,
        clients=tuple(records),
        selected=tuple(tuple(selected[ExpertKey(layer, e)] for e in range(experts)) for layer in range(layers)),
        usage=tuple(tuple(float(value) for value in row) for row in usage),
        bytes_up=sum(record.bytes_up for record in [*records, *ahead]),
        bytes_down=sum(record.bytes_down for record in [*records, *ahead]),
        seconds=seconds,
        phases=dict(phases),
        agreement=agreement(profiles),
        participation=participation,
        simulated_seconds=simulated,
        nodes=tuple(nodes),
    )


def with_evaluation(report: RoundReport, found: Evaluation) -> RoundReport:
    """The report of a round with what its evaluation has found."""
    return replace(
        report,
        accuracy=found.accuracy,
        test_loss=found.loss,
        own_accuracy=found.own_accuracy,
        personalised_accuracy=found.personalised_accuracy,
        benchmarks={name: score.fields for name, score in found.benchmarks.items()},
        backdoor_success=found.backdoor,
    )


def run_facts(
    context: RunContext,
    tiers: Sequence[Tier],
    samples: Sequence[int],
    resumed_from: int | None,
    predicted: Mapping[str, float],
    *,
    gpus: bool,
) -> dict[str, Any]:
    """Returns what is known before the first round: who takes part with what, the partition, the model's shape.

    Args:
        context: The prepared run.
        tiers: Tier of every client.
        samples: Training examples of every client.
        resumed_from: The last round of the checkpoint, if the run goes on with one.
        predicted: `predicted_memory`, or empty where it cannot be compared with what is seen.
        gpus: Whether clients whose tier does not say otherwise compute on GPUs.
    """
    of_tier = {}
    for name, tier in {tier.name: tier for tier in tiers}.items():
        resident, batch = budget.expert_counts(tier, context.model.shape)
        spec = budget.resources(tier, gpus)
        asked = {"num_cpus": spec.num_cpus, "num_gpus": spec.num_gpus, "memory_gib": tier.memory_gib}
        of_tier[name] = {"tier": name, "resident_experts": resident, "batch_experts": batch, "resources": asked}
    return {
        "clients": [
            {"client": client, "samples": count, **of_tier[tier.name]}
            for client, (tier, count) in enumerate(zip(tiers, samples, strict=True))
        ],
        "partition": context.data.counts,
        "labels": context.data.label_names,
        "cut": context.data.cut,
        "shape": asdict(context.model.shape),
        "model_sha256": context.model.sha256,
        "data_sha256": context.data.sha256,
        "versions": {package: version(package) for package in _PACKAGES},
        "predicted_mib": predicted,
        "resumed_from": resumed_from,
        "hostile": _hostile(context),
    }


def predicted_memory(context: RunContext, *, gpus: bool) -> dict[str, float]:
    """Returns what a client of each tier is predicted to need while it trains, by its texts' real lengths.

    In MiB, comparable with `ClientRecord.peak_mib`: on a GPU without what the driver keeps for the process.

    Args:
        context: The prepared run.
        gpus: Whether clients whose tier does not say otherwise compute on GPUs.
    """
    shape, lengths = context.model.shape, typical_lengths(context)
    return {
        one.tier: (one.memory_bytes - (CONTEXT_BYTES if one.asked.num_gpus else 0)) / 2**20
        for one in forecast(context.experiment, shape, gpus_available=gpus, lengths=lengths)
    }


def run_summary(
    context: RunContext, state: FederationState, status: str, predicted: Mapping[str, float]
) -> dict[str, Any]:
    """Returns the keys of summary.json; `predicted` is `predicted_memory`, or empty where it cannot be compared."""
    experiment = context.experiment
    target = experiment.evaluate.target
    reached = [round for round, accuracy in state.accuracies if target is not None and accuracy >= target]
    values = [accuracy for _, accuracy in state.accuracies]
    return {
        "name": experiment.name,
        "status": status,
        "strategy": experiment.strategy.name,
        "seed": experiment.seed,
        "rounds": max(state.round, 0),
        "accuracy": values[-1] if values else None,
        "initial_accuracy": values[0] if values else None,
        "best_accuracy": max(values, default=None),
        **_over_clients("own", state.own_accuracies),
        **_over_clients("personalised", state.personalised_accuracies),
        "benchmarks": _before_and_after(state),
        "target": target,
        "rounds_to_target": reached[0] if reached else None,
        "wall_seconds": state.seconds,
        "simulated_seconds": state.simulated[-1] if state.simulated else None,
        "simulated_seconds_to_target": state.simulated[reached[0]] if state.simulated and reached else None,
        "bytes_up": state.bytes_up,
        "bytes_down": state.bytes_down,
        "peak_client_mib": max(state.peaks_mib.values(), default=0.0),
        "memory": {
            tier: {"predicted_mib": predicted.get(tier), "seen_mib": peak} for tier, peak in state.peaks_mib.items()
        },
        "model_sha256": model_sha256(state.weights, context.model.sha256),
        "clients": {name: state.statuses[name] for name in _STATUSES},
        "training_failures": state.out_of_memory / max(state.trainings, 1),
        **_of_attack(context, state),
    }


def _hostile(context: RunContext) -> list[int]:
    """Clients that attack, in a simulated attack."""
    experiment = context.experiment
    return sorted(hostile_clients(experiment.attack, experiment.clients.count, experiment.seed))


def _of_attack(context: RunContext, state: FederationState) -> dict[str, Any]:
    """That the run was attacked on purpose, and how far a backdoor came."""
    attack = context.experiment.attack
    if attack is None:
        return {}
    told = {"attack": {"simulated": attack.kind, "clients": _hostile(context)}}
    return told | ({"backdoor_success": state.backdoor_success} if attack.kind == "backdoor" else {})


def _over_clients(name: str, accuracies: Mapping[int, float]) -> dict[str, Any]:
    """What is told of the clients' accuracies on their own test splits."""
    return {
        f"{name}_accuracy": mean_accuracy(accuracies),
        f"{name}_worst_tenth": worst_tenth(accuracies),
        f"{name}_variance": variance(accuracies),
        f"{name}_accuracy_by_client": {str(client): value for client, value in sorted(accuracies.items())},
    }


def _before_and_after(state: FederationState) -> dict[str, dict[str, Mapping[str, float]]]:
    """By benchmark, what the first model answered and what the last one did."""
    rounds = sorted(state.benchmarks)
    moments = dict(zip(("before", "after"), (rounds[0], rounds[-1]), strict=True)) if rounds else {}
    names = state.benchmarks[rounds[0]] if rounds else {}
    return {name: {moment: state.benchmarks[round][name] for moment, round in moments.items()} for name in names}
