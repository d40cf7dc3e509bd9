"""What a batch of texts occupies, from how long they are, and what a plan makes of it."""

from pathlib import Path

import numpy as np
import pytest

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.data.lengths import Lengths
from hfedmoe_ray.estimates import estimate_memory
from hfedmoe_ray.types import ModelShape

SHAPE = ModelShape(
    layers=3,
    experts=4,
    top_k=2,
    hidden=64,
    expert_bytes=4 * 3 * 64 * 128,
    shared_bytes=4096,
    frozen_bytes=2**20,
    table_bytes=4 * 64 * 50_000,
)


def test_texts_of_one_length_occupy_exactly_that():
    lengths = Lengths(texts=np.full(10, 30), prompts=np.full(10, 20))
    assert lengths.batch(4, 6) == (4 * 30, 4 * 10)
    assert Lengths(texts=np.full(10, 30)).batch(4, 6) == (4 * 30, 4)


def test_padding_counts_and_the_largest_batch_decides():
    lengths = Lengths(texts=np.arange(10, 60), prompts=np.arange(5, 55))
    one, many = (lengths.batch(4, batches) for batches in (1, 20))
    assert 4 * lengths.texts.mean() < one[0] < many[0] <= 4 * 59
    assert one[1] == many[1] == 4 * 5


@pytest.mark.parametrize("task", ["classification", "causal"])
def test_short_texts_need_less_than_those_a_plan_assumes(quickstart: Path, task: str):
    experiment = load_experiment(quickstart)
    experiment = experiment.model_copy(update={"model": experiment.model.model_copy(update={"task": task})})
    tier = experiment.clients.tiers[0]

    def told(lengths: Lengths | None) -> int:
        return estimate_memory(experiment, SHAPE, tier, 6, 6, gpu=False, lengths=lengths)

    longest, half = experiment.data.max_length, experiment.data.max_length // 2
    texts = {size: Lengths(texts=np.full(9, size), prompts=np.full(9, size - 8)) for size in (half, longest)}
    assert told(texts[half]) < told(texts[longest])
    if task == "classification":
        assert told(texts[longest]) == told(None)
    else:
        more = Lengths(texts=np.full(9, longest), prompts=np.full(9, longest - 9))
        # One more word to predict an example: its logits, their softmax and its gradient.
        assert told(more) - told(texts[longest]) == experiment.local.batch_size * 3 * 4 * SHAPE.vocabulary
