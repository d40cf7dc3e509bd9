"""Benchmarks by log-likelihood: which of several texts a model would rather write, and how likely it finds a text."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hfedmoe_ray.data.batches import Batch
from hfedmoe_ray.data.choices import Choices
from hfedmoe_ray.data.passages import Passages
from hfedmoe_ray.types import Array, FloatArray


def answer(
    choices: Choices, forward: Callable[[Array], tuple[Batch, Tensor]], size: int, poll: Callable[[], None]
) -> dict[str, Any]:
    """Returns how a model answers, as fields of `ClientMetrics`.

    Args:
        choices: The items.
        forward: Returns some rows of them and their logits.
        size: Rows of one forward pass.
        poll: Called before each; may raise.
    """
    scores = likelihoods(choices, forward, size, poll)
    return {
        "tokens": int(choices.rows.lengths.sum()),
        "loss": -float(scores.sum()) / max(choices.rows.weight(np.arange(len(choices.rows))), 1),
        "examples": len(choices),
        "answered": {
            "accuracy": float(right_answers(scores, choices)),
            "normalised": float(right_answers(scores / np.maximum(choices.lengths, 1), choices)),
        },
    }


def surprise(
    passages: Passages, forward: Callable[[Array], tuple[Batch, Tensor]], size: int, poll: Callable[[], None]
) -> dict[str, Any]:
    """Returns how likely a model finds texts, as fields of `ClientMetrics`; see `answer`."""
    nll = -float(likelihoods(passages, forward, size, poll).sum())
    predicted = passages.rows.weight(np.arange(len(passages.rows)))
    counts = {"tokens": predicted, "words": passages.words.sum(), "bytes": passages.bytes.sum()}
    return {
        "tokens": int(passages.rows.lengths.sum()),
        "loss": nll / max(predicted, 1),
        "examples": len(passages.words),
        "answered": {"nll": nll} | {unit: float(count) for unit, count in counts.items()},
    }


@torch.inference_mode()
def likelihoods(
    asked: Choices | Passages,
    forward: Callable[[Array], tuple[Batch, Tensor]],
    size: int,
    poll: Callable[[], None],
) -> FloatArray:
    """Returns the log-likelihood of every row, such as a choice after its prompt, [R]; see `answer`."""
    scores = np.zeros(len(asked.rows))
    # Rows of like length together: little padding, whatever the order of the items.
    order = np.argsort(asked.rows.lengths, kind="stable")
    for start in range(0, len(order), size):
        poll()
        rows = order[start : start + size]
        scores[rows] = log_likelihoods(*forward(rows))
    return scores


def log_likelihoods(batch: Batch, logits: Tensor) -> FloatArray:
    """Returns the log-likelihood of what is to be written in each row, summed over its tokens, [B].

    Args:
        batch: Rows with `targets`, N in all.
        logits: At these, [N, V].
    """
    labels = torch.from_numpy(batch.labels).to(logits.device)
    each = -cross_entropy(logits.float(), labels, reduction="none").double().cpu().numpy()
    sums = np.zeros(batch.examples)
    np.add.at(sums, batch.asked, each)
    return sums


def right_answers(scores: Array, choices: Choices) -> int:
    """Returns how many items have their right choice scored highest; of equal ones the first counts."""
    rows = [choices.item == item for item in range(len(choices))]
    return sum(int(np.argmax(scores[own])) == int(answer) for own, answer in zip(rows, choices.answers, strict=True))
