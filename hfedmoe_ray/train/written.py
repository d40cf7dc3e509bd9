"""Answers that a language model writes, against the right ones."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hfedmoe_ray.config.evaluation import Benchmark
from hfedmoe_ray.data.exercises import Prompts, is_right
from hfedmoe_ray.data.tokenize import pad_id
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.types import Array


class _Polled:
    """Asks after every token whether to go on."""

    def __init__(self, poll: Callable[[], None]) -> None:
        self._poll = poll

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        self._poll()
        return scores


def answer_by_writing(
    model: SparseModel,
    tokenizer: Any,
    prompts: Prompts,
    benchmark: Benchmark,
    *,
    size: int,
    precision: AbstractContextManager[Any],
    poll: Callable[[], None],
) -> dict[str, Any]:
    """Returns how a model answers, as fields of `ClientMetrics`.

    Args:
        model: Bound, in evaluation mode.
        tokenizer: Of its prompts.
        prompts: The exercises.
        benchmark: Says how much is written, and what of it counts.
        size: Exercises written at once.
        precision: What the model computes in.
        poll: Called before each token; may raise.
    """
    right = tokens = 0
    with torch.inference_mode(), precision, model.writing():
        for row, text, count in written(model.module, tokenizer, prompts, benchmark, size=size, poll=poll):
            right += is_right(text, prompts.answers[row], benchmark)
            tokens += count
    return {
        "tokens": tokens,
        "loss": 0.0,
        "examples": len(prompts.answers),
        "answered": {"exact_match": float(right)},
    }


def written(
    module: Any,
    tokenizer: Any,
    prompts: Prompts,
    benchmark: Benchmark,
    *,
    size: int,
    poll: Callable[[], None],
) -> Iterator[tuple[int, str, int]]:
    """Yields exercises, what is written to each, and how many tokens were read and written; like lengths together.

    Args:
        module: A transformers model that writes.
        tokenizer: See `answer_by_writing`, and for all that follows.
        prompts: The exercises.
        benchmark: Says how much is written.
        size: Exercises written at once.
        poll: Called before each token; may raise.
    """
    translates = module.config.is_encoder_decoder
    order = np.argsort(prompts.rows.lengths, kind="stable")
    fill = pad_id(tokenizer)
    stops: dict[str, Any] = {"stop_strings": list(benchmark.until), "tokenizer": tokenizer} if benchmark.until else {}
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        batch = prompts.rows.batch(rows)
        ids, mask = batch.input_ids, batch.attention_mask
        if not translates:
            # What is written follows the prompt at once: padding stands before it.
            ids, mask = _shifted(ids, mask), _shifted(mask, mask)
        made = module.generate(
            input_ids=torch.from_numpy(ids).to(module.device),
            attention_mask=torch.from_numpy(mask).to(module.device),
            max_new_tokens=benchmark.max_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=fill,
            logits_processor=[_Polled(poll)],
            **stops,
        ).cpu()
        new = made if translates else made[:, ids.shape[1] :]
        for row, answer, read in zip(rows, new, mask.sum(axis=1), strict=True):
            text = tokenizer.decode(answer, skip_special_tokens=True)
            yield int(row), text, int(read) + int((answer != fill).sum())


def _shifted(values: Array, mask: Array) -> Array:
    """Rows with their padding moved from the right to the left."""
    return np.stack([np.roll(row, len(row) - int(real)) for row, real in zip(values, mask.sum(axis=1), strict=True)])
