"""What a model answers to a benchmark, whichever kind it is of."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from hfedmoe_ray.config.evaluation import Benchmark
from hfedmoe_ray.data.batches import Batch
from hfedmoe_ray.data.choices import Choices
from hfedmoe_ray.data.exercises import Prompts
from hfedmoe_ray.data.passages import Passages
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.train.likelihood import answer, surprise
from hfedmoe_ray.train.written import answer_by_writing
from hfedmoe_ray.types import Array


def answered(
    asked: Choices | Passages | Prompts,
    model: SparseModel,
    benchmark: Benchmark,
    *,
    forward: Callable[[Array], tuple[Batch, Tensor]],
    tokenizer: Callable[[], Any],
    size: int,
    precision: AbstractContextManager[Any],
    poll: Callable[[], None],
) -> dict[str, Any]:
    """Returns how a model answers, as fields of `ClientMetrics`.

    Args:
        asked: The items.
        model: Bound, in evaluation mode.
        benchmark: What they are of.
        forward: Returns some rows of them and their logits.
        tokenizer: Loads it, where answers are written.
        size: Rows of one forward pass.
        precision: What the model computes in where it writes.
        poll: Called now and then; may raise.
    """
    match asked:
        case Choices():
            return answer(asked, forward, size, poll)
        case Passages():
            return surprise(asked, forward, size, poll)
        case Prompts():
            return answer_by_writing(model, tokenizer(), asked, benchmark, size=size, precision=precision, poll=poll)
