"""Routing profiles: bounds of the information term, streaming, and what counts as a token."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfedmoe_ray.moe.routing import ProfileAccumulator, RoutingTape, Specific
from hfedmoe_ray.types import ExpertKey, ModelShape, RoutingProfile

LAYERS, EXPERTS, TOP_K, HIDDEN = 2, 5, 2, 3
SHAPE = ModelShape(
    layers=LAYERS, experts=EXPERTS, top_k=TOP_K, hidden=HIDDEN, expert_bytes=1, shared_bytes=1, frozen_bytes=1
)


def record(logits: torch.Tensor, mask: torch.Tensor | None = None) -> RoutingTape:
    """A tape after one forward pass with these router logits, [L, T, E]."""
    tape = RoutingTape(LAYERS)
    tape.begin(mask)
    for layer in range(LAYERS):
        tape.record(layer, logits[layer], logits[layer].topk(TOP_K, dim=-1).indices)
    return tape


def draw(seed: int, tokens: int, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(LAYERS, tokens, EXPERTS, generator=torch.Generator().manual_seed(seed))


def batch_statistics(tape: RoutingTape, specific: Specific) -> RoutingProfile:
    """The profile of one forward pass."""
    accumulator = ProfileAccumulator(SHAPE, specific)
    accumulator.add(tape)
    return accumulator.profile()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 60), spread=st.floats(0.0, 30.0))
def test_information_is_bounded(seed: int, tokens: int, spread: float) -> None:
    """0 <= KL(e) <= p(e) log N (METHODS, eq. 11)."""
    profile = batch_statistics(record(draw(seed, tokens, spread)), "max")
    assert (profile.kl >= 0).all()
    assert (profile.kl <= profile.usage * math.log(tokens) + 1e-6).all()
    np.testing.assert_allclose(profile.usage.sum(axis=1), 1.0, atol=1e-6)
    assert (profile.specific >= profile.usage - 1e-6).all()


def test_information_is_zero_only_for_constant_gates() -> None:
    constant = draw(0, 1).expand(LAYERS, 20, EXPERTS)
    assert batch_statistics(record(constant), "max").kl.max() < 1e-7
    assert batch_statistics(record(draw(0, 20)), "max").kl.min() > 1e-4


def test_information_reaches_its_upper_bound() -> None:
    """One token that owns an expert, in a batch that never touches it otherwise: KL = p log N."""
    logits = torch.full((LAYERS, 16, EXPERTS), -200.0)
    logits[:, :, 0] = 0.0
    logits[:, 3, :] = torch.tensor([-200.0, 0.0, -200.0, -200.0, -200.0])
    profile = batch_statistics(record(logits), "max")
    np.testing.assert_allclose(profile.kl[:, 1], math.log(16) / 16, rtol=1e-6)


def test_information_equals_its_definition() -> None:
    logits = draw(1, 30)
    gates = torch.softmax(logits.double(), dim=-1).numpy()
    p = gates.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(
        batch_statistics(record(logits), "max").kl, (gates * np.log(gates / p)).mean(axis=1), atol=1e-6
    )


@pytest.mark.parametrize("split", [[37], [1, 36], [12, 12, 13]])
def test_streaming_equals_one_shot(split: list[int]) -> None:
    logits = draw(2, 37)
    once = batch_statistics(record(logits), "max")
    accumulator = ProfileAccumulator(SHAPE, "max")
    for part in logits.split(split, dim=1):
        accumulator.add(record(part))
    streamed = accumulator.profile()
    merged = ProfileAccumulator(SHAPE, "max")
    for part in logits.split(split, dim=1):
        one = ProfileAccumulator(SHAPE, "max")
        one.add(record(part))
        merged.merge(one)
    for name in ("usage", "specific", "kl", "routed"):
        np.testing.assert_allclose(getattr(streamed, name), getattr(once, name), rtol=1e-6, atol=1e-9, err_msg=name)
        np.testing.assert_array_equal(getattr(merged.profile(), name), getattr(streamed, name), err_msg=name)
    assert streamed.tokens == 37
    assert streamed.routed.sum() == LAYERS * 37 * TOP_K


def test_padding_is_no_token() -> None:
    logits = draw(3, 12)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]])
    real = mask.flatten().bool()
    padded, bare = batch_statistics(record(logits, mask), "max"), batch_statistics(record(logits[:, real]), "max")
    assert padded.tokens == 8
    for name in ("usage", "specific", "kl", "routed"):
        np.testing.assert_array_equal(getattr(padded, name), getattr(bare, name))


def test_quantile_is_below_the_maximum_and_streams_as_the_largest_of_the_batches() -> None:
    logits = draw(4, 400)
    largest, quantile = (batch_statistics(record(logits), kind).specific for kind in ("max", "q99"))
    assert (quantile < largest).all()
    gates = torch.softmax(logits, dim=-1).numpy()
    np.testing.assert_allclose(quantile, np.quantile(gates, 0.99, axis=1), rtol=1e-5)
    accumulator = ProfileAccumulator(SHAPE, "q99")
    parts = logits.split(100, dim=1)
    for part in parts:
        accumulator.add(record(part))
    expected = np.max([batch_statistics(record(part), "q99").specific for part in parts], axis=0)
    np.testing.assert_allclose(accumulator.profile().specific, expected)


def test_a_batch_of_padding_only_is_ignored() -> None:
    accumulator = ProfileAccumulator(SHAPE, "max")
    accumulator.add(record(draw(5, 4), torch.zeros(1, 4)))
    profile = accumulator.profile()
    assert profile.tokens == 0
    assert not profile.usage.any()
    assert np.isfinite(profile.kl).all()


def test_mean_outputs_weigh_every_token_alike() -> None:
    accumulator = ProfileAccumulator(SHAPE, "max")
    outputs = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(0))
    for part in (outputs[:2], outputs[2:]):
        tape = record(draw(6, 4))
        tape.record_output(ExpertKey(1, 3), part)
        accumulator.add(tape)
    (key, (mean, tokens)) = next(iter(accumulator.means().items()))
    assert (key, tokens, mean.dtype) == (ExpertKey(1, 3), 9, np.float32)
    np.testing.assert_allclose(mean, outputs.mean(dim=0).numpy(), rtol=1e-6)


def test_an_empty_tape_says_so() -> None:
    with pytest.raises(RuntimeError, match="forward pass"):
        batch_statistics(RoutingTape(LAYERS), "max")
