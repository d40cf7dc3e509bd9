"""FLAME: all experts everywhere, k_i active, a private learned scale, averages weighted by f^t |D|."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_updates import KEYS, PLAN, update
from moe_models import LABELS, batch, plan, prepare, save_mixtral, task_weights
from tiny_federation import experiment, final_weights, run
from torch.nn.functional import cross_entropy

from hfedmoe_ray.config import strategies as configs
from hfedmoe_ray.federation.checkpoint import load_checkpoint, run_identity
from hfedmoe_ray.federation.validation import Rejected, check_update
from hfedmoe_ray.moe.prepare import initial_weights
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.strategies import build_strategy
from hfedmoe_ray.types import ClientInfo, ModelShape

ALL_TRAIN = plan("TTTTTT", "TTTTTT")
SHAPE = ModelShape(layers=2, experts=4, top_k=4, hidden=3, expert_bytes=1, shared_bytes=1, frozen_bytes=1)
CLIENTS = [
    ClientInfo(client=c, tier="t", resident_experts=held, batch_experts=held, samples=10)
    for c, held in enumerate([2, 4, 8])
]


def test_a_client_holds_all_experts_and_activates_its_share_of_the_models_top_k() -> None:
    strategy = build_strategy(configs.Flame(), SHAPE, 0)
    for plans, trained in ((strategy.plan(1, CLIENTS, {}), 8), (strategy.deploy(1, CLIENTS, {}), 0)):
        assert [plans[c.client].top_k for c in CLIENTS] == [1, 2, 4]
        assert all(len(made.present) == 8 and len(made.trainable) == trained for made in plans.values())
        assert all(made.scale == (1.0, 1.0) for made in plans.values())


def test_each_client_gets_its_own_scale_back_and_nobody_elses() -> None:
    strategy = build_strategy(configs.Flame(), SHAPE, 0)
    strategy.observe(1, {1: replace(update(1, KEYS), scale=(0.5, 2.0))}, {1: PLAN})
    plans = strategy.plan(2, CLIENTS, {})
    assert [plans[c].scale for c in range(3)] == [(1.0, 1.0), (0.5, 2.0), (1.0, 1.0)]
    assert build_strategy(configs.Flame(rescale=False), SHAPE, 0).plan(1, CLIENTS, {})[0].scale is None


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_averages_weigh_frequency_to_the_t_times_examples(temperature: float) -> None:
    rule = build_strategy(configs.Flame(temperature=temperature), SHAPE, 0).expert_rule
    made = update(0, KEYS[:3], samples=7)
    assert made.profile is not None
    routed = np.arange(8.0).reshape(2, 4) * 10
    made = replace(made, profile=replace(made.profile, routed=routed, tokens=200))
    for key in KEYS:
        expected = 7 * (routed[key] / 200) ** temperature if key in KEYS[:3] else 0.0
        assert rule(made, PLAN, key) == pytest.approx(expected)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_mixtral(tmp_path_factory.mktemp("mixtral"))


def test_a_scale_multiplies_the_last_matrix_of_every_expert_and_learns_as_they_would(
    mixtral: Path, tmp_path: Path
) -> None:
    """Experts end in W_down, so scaling it is the reference; the scale's gradient is then sum over e of <W, dL/dW>."""
    prepared = prepare(mixtral, tmp_path)
    model, weights = SparseModel(prepared.path), task_weights(prepared)
    ids, mask = batch()
    few = replace(ALL_TRAIN, top_k=1)
    model.bind(few, weights, "experts")
    plain = model.forward(ids, mask)
    assert model.scales == ()
    model.bind(replace(few, scale=(1.0, 1.0)), weights, "experts")
    assert torch.equal(model.forward(ids, mask), plain)
    scale = (0.5, 1.75)
    scaled = {
        key: {**named, "down_proj": named["down_proj"] * np.float32(scale[key.layer])}
        for key, named in weights.experts.items()
    }
    model.bind(few, replace(weights, experts=scaled), "experts")
    expected = model.forward(ids, mask)
    model.bind(replace(few, scale=scale), weights, "experts")
    logits = model.forward(ids, mask)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    cross_entropy(logits, torch.arange(len(ids)) % LABELS).backward()
    for layer, factor in enumerate(model.scales):
        downs = [named["down_proj"] for key, named in model.expert_parameters.items() if key.layer == layer]
        total = sum(float((down.detach() * down.grad).sum()) for down in downs if down.grad is not None)
        assert float(factor.grad) * float(factor.detach()) == pytest.approx(total, rel=1e-3)
        assert total != 0


@pytest.mark.parametrize("scale", [(), (1.0,), (1.0, float("nan"))])
def test_a_scale_that_was_not_asked_for_or_is_not_finite_is_rejected(scale: tuple[float, ...]) -> None:
    from made_up_updates import weights

    sent = replace(update(0, KEYS), scale=scale)
    with pytest.raises(Rejected, match="output scales"):
        check_update(sent, replace(PLAN, scale=(1.0, 1.0)), weights(), trains=True)
    check_update(replace(sent, scale=(0.9, 1.1)), replace(PLAN, scale=(1.0, 1.0)), weights(), trains=True)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_two_rounds_learn_scales_that_survive_the_server(
    sources: Path, tmp_path: Path, lora: dict[str, int] | None
) -> None:
    model = {"source": str(sources / "mixtral"), "trainable": "experts", "lora": lora}
    made = experiment(sources, "mixtral", strategy="flame", model=model)
    context, summary, _ = run(made, tmp_path / "straight")
    assert summary["status"] == "finished"
    run(made, tmp_path / "broken", stop_after=1)
    resumed, _, _ = run(made, tmp_path / "broken", resume=True)
    first, second = (load_checkpoint(c.run_dir / "checkpoints", run_identity(c)) for c in (context, resumed))
    assert sorted(first.strategy) == [f"scale.{client}" for client in range(4)]
    for name, scale in first.strategy.items():
        assert scale.shape == (2,)
        assert (scale != 1.0).all()
        np.testing.assert_array_equal(second.strategy[name], scale)
    values = np.stack(list(first.strategy.values()))
    assert len(np.unique(values, axis=0)) == 4
    # The global model has no trace of them: the same parameters as ever.
    before, after = initial_weights(context.model, "experts", made.model.lora), final_weights(context)
    assert after.shared.keys() == before.shared.keys()
    assert any((a != before.experts[key][n]).any() for key, t in after.experts.items() for n, a in t.items())
