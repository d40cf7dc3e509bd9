"""Multiple choice by log-likelihood: which of several texts a language model would rather write after a prompt."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hfedmoe_ray.data.batches import Batch
from hfedmoe_ray.data.choices import Choices
from hfedmoe_ray.types import Array, FloatArray


def answer(
    choices: Choices, forward: Callable[[Array], tuple[Batch, Tensor]], size: int, poll: Callable[[], None]
) -> dict[str, float]:
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
        "correct": right_answers(scores, choices),
        "correct_normalised": right_answers(scores / np.maximum(choices.lengths, 1), choices),
        "examples": len(choices),
    }


@torch.inference_mode()
def likelihoods(
    choices: Choices, forward: Callable[[Array], tuple[Batch, Tensor]], size: int, poll: Callable[[], None]
) -> FloatArray:
    """Returns the log-likelihood of every choice after its prompt, [R]; see `answer`."""
    scores = np.zeros(len(choices.rows))
    # Rows of like length together: little padding, whatever the order of the items.
    order = np.argsort(choices.rows.lengths, kind="stable")
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
