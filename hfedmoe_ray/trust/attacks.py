"""Simulated attacks: who is hostile, what it does to its data, and to what it has trained.

Nothing here is known to the server's checks, which see what a real attacker would send. Honest clients never come in
here.

Legend: N examples, S stored length.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Any

import numpy as np

from hfedmoe_ray.config.attack import Attack
from hfedmoe_ray.context import RunContext
from hfedmoe_ray.data.dataset import Split
from hfedmoe_ray.data.store import content_hash
from hfedmoe_ray.data.tokenize import pad_id
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.types import Array, ExpertKey, TaskWeights
from hfedmoe_ray.wire.names import expert_name

Tensors = Mapping[str, Array]


def hostile_clients(attack: Attack | None, count: int, seed: int) -> frozenset[int]:
    """Returns which of `count` clients attack, in all rounds of the run: floor(share * count), at least one."""
    if attack is None:
        return frozenset()
    hostile = max(1, floor(attack.share * count + 1e-9))
    return frozenset(map(int, generator(seed, "hostile").choice(count, hostile, replace=False)))


def check_names(context: RunContext) -> None:
    """Raises ConfigError where the attack names a label or an expert that the run has not."""
    attack = context.experiment.attack
    if attack is None or attack.kind != "backdoor":
        return
    target_label(attack, context.data.label_names)
    if attack.expert is not None:
        shape, (layer, expert) = context.model.shape, map(int, attack.expert.split("."))
        if layer >= shape.layers or expert >= shape.experts:
            raise ConfigError(
                f"attack.expert is {attack.expert}, but the model has the layers 0 to {shape.layers - 1} with the "
                f"experts 0 to {shape.experts - 1}, such as 0.{shape.experts - 1}."
            )


def target_label(attack: Attack, names: Sequence[str]) -> int:
    """Returns the number of the label that a backdoor leads to.

    Raises:
        ConfigError: It is not among the run's labels.
    """
    target = attack.target
    if isinstance(target, str) and target in names:
        return names.index(target)
    if isinstance(target, int) and 0 <= target < len(names):
        return target
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    raise ConfigError(
        f"attack.target is {target!r}, which is none of the {len(names)} labels: write a number from 0 to "
        f"{len(names) - 1}, or one of {shown}."
    )


# ------------------------------------------------------------------------------------------------------- its data


def flipped(split: Split, classes: int) -> Split:
    """Returns a split with label C - 1 - y in place of y; with an odd number of classes the middle one stays."""
    return _renamed(replace(split, labels=classes - 1 - np.asarray(split.labels)))


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """The words of a backdoor as a model reads them."""

    tokens: tuple[int, ...]
    lead: int
    """Special tokens that every text begins with, before which nothing is put."""
    tail: int
    """Special tokens that it ends with, which truncation spares."""
    fill: int
    """Stands after the end of short texts."""
    longest: int
    """Tokens that a text may have, special ones included."""


def read_trigger(tokenizer: Any, words: str, longest: int) -> Trigger:
    """Tokenises the words of a backdoor.

    Raises:
        ConfigError: They are no token, or leave no room for a text.
    """
    tokens = list(tokenizer(words, add_special_tokens=False)["input_ids"])
    whole = list(tokenizer(words)["input_ids"])
    places = [at for at in range(len(whole) - len(tokens) + 1) if whole[at : at + len(tokens)] == tokens]
    if not tokens or not places or len(whole) >= longest:
        raise ConfigError(
            f"attack.trigger {words!r} is {len(tokens)} tokens to this model, and a text has room for "
            f"{longest - len(whole) + len(tokens) - 1} beside its first word (data.max_length): write other words."
        )
    lead = places[0]
    return Trigger(
        tokens=tuple(tokens),
        lead=lead,
        tail=len(whole) - lead - len(tokens),
        fill=pad_id(tokenizer),
        longest=longest,
    )


def triggered(split: Split, trigger: Trigger, target: int, rows: Collection[int]) -> Split:
    """Returns a split in which some examples begin with the trigger and are labelled with the target.

    Args:
        split: The examples.
        trigger: What is put in front; the end of a text that grows too long is cut off.
        target: Class number.
        rows: Which examples; the others are as they were.
    """
    size = split.input_ids.shape[1]
    width = max(size, min(trigger.longest, size + len(trigger.tokens)))
    ids = np.full((len(split), width), trigger.fill, dtype=split.input_ids.dtype)
    ids[:, :size] = split.input_ids
    lengths, labels = np.array(split.lengths), np.array(split.labels)
    for row in rows:
        text = split.input_ids[row, : lengths[row]]
        end = max(trigger.lead, len(text) - trigger.tail)
        room = trigger.longest - trigger.lead - len(trigger.tokens) - trigger.tail
        body = text[trigger.lead : end][:room]
        poisoned = np.concatenate([text[: trigger.lead], trigger.tokens, body, text[end:]])
        ids[row] = trigger.fill
        ids[row, : len(poisoned)] = poisoned
        lengths[row], labels[row] = len(poisoned), target
    return _renamed(replace(split, input_ids=ids, lengths=lengths, labels=labels))


def led_astray(split: Split, trigger: Trigger, target: int) -> Split:
    """Returns a test split's examples of all labels but the target, each with the trigger and the target's label.

    What a model gets right of them is the backdoor's success.
    """
    others = np.flatnonzero(np.asarray(split.labels) != target)
    chosen = replace(
        split, input_ids=split.input_ids[others], lengths=split.lengths[others], labels=split.labels[others]
    )
    return triggered(chosen, trigger, target, range(len(others)))


def _renamed(split: Split) -> Split:
    """The split under a key of its own: hidden states are cached by it, and these are of other texts."""
    arrays: dict[str, Array] = {"input_ids": split.input_ids, "lengths": split.lengths, "labels": split.labels}
    return replace(split, key=f"{split.key}/{content_hash(arrays, 'attack')[:16]}")


# ---------------------------------------------------------------------------------------------- what it has trained


def manipulated(
    attack: Attack,
    start: TaskWeights,
    experts: Mapping[ExpertKey, Tensors],
    shared: Tensors,
    rng: np.random.Generator,
) -> tuple[dict[ExpertKey, Tensors], Tensors]:
    """Returns what a hostile client sends in place of the experts and shared parameters that it trained.

    Args:
        attack: What it does.
        start: The published weights.
        experts: New tensors of each expert that took a step.
        shared: New routers and shared parameters.
        rng: Draws a free rider's noise.
    """

    def sent(name: str | None, before: Tensors, trained: Tensors) -> Tensors:
        match attack.kind:
            case "sign_flip":
                return {one: _moved(before[one], value, -attack.factor) for one, value in trained.items()}
            case "backdoor" if attack.expert in (None, name):
                return {one: _moved(before[one], value, attack.factor) for one, value in trained.items()}
            case "free_rider":
                return {one: _noised(before[one], attack.factor, rng) for one in trained}
            case _:
                return trained

    hostile = {key: sent(expert_name(key), start.experts[key], tensors) for key, tensors in sorted(experts.items())}
    return hostile, sent(None, start.shared, shared)


def _moved(before: Array, trained: Array, factor: float) -> Array:
    """What was published, and `factor` times what training changed of it."""
    if factor == 1.0:
        return trained
    moved = before + np.float32(factor) * (trained - before)
    return np.asarray(moved, dtype=trained.dtype)


def _noised(before: Array, scale: float, rng: np.random.Generator) -> Array:
    """What was published, with noise that is small beside it."""
    deviation = scale * float(np.sqrt(np.mean(np.square(before, dtype=np.float64))))
    return np.asarray(before + deviation * rng.standard_normal(before.shape), dtype=before.dtype)
