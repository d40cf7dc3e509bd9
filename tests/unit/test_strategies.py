"""Strategies: budgets kept, the right set chosen, batch selection, deployment, profiles blended."""

import numpy as np
import pytest

from hfedmoe_ray.config import strategies as configs
from hfedmoe_ray.strategies import build_strategy
from hfedmoe_ray.strategies.scores import uniform_plan
from hfedmoe_ray.types import ClientInfo, ModelShape, Role, RoutingProfile

SHAPE = ModelShape(layers=2, experts=8, top_k=2, hidden=4, expert_bytes=1, shared_bytes=1, frozen_bytes=1)
CLIENTS = [
    ClientInfo(client=c, tier="t", resident_experts=budget, batch_experts=budget, samples=10)
    for c, budget in enumerate([2, 4, 8])
]


def profile(seed=0, **changes):
    rng = np.random.default_rng(seed)
    usage = rng.dirichlet(np.ones(8), size=2)
    fields = {"usage": usage, "specific": usage * 2, "kl": usage / 2, "routed": np.ones((2, 8)), "tokens": 100}
    return RoutingProfile(**{**fields, **changes})


PROFILES = {c.client: profile(c.client) for c in CLIENTS}
BUDGETED = [configs.HFedMoE(), configs.RandomExperts()]


@pytest.mark.parametrize("config", BUDGETED, ids=lambda c: c.name)
def test_every_client_trains_exactly_its_budget_with_something_in_every_layer(config):
    plans = build_strategy(config, SHAPE, 0).plan(1, CLIENTS, PROFILES)
    for client in CLIENTS:
        plan = plans[client.client]
        assert len(plan.trainable) == client.resident_experts
        assert {key.layer for key in plan.trainable} == {0, 1}
        assert plan.absent == "mean"


@pytest.mark.parametrize("config", BUDGETED, ids=lambda c: c.name)
def test_a_plan_is_a_function_of_seed_round_and_client(config):
    first = build_strategy(config, SHAPE, 0).plan(3, CLIENTS, PROFILES)
    assert build_strategy(config, SHAPE, 0).plan(3, CLIENTS[::-1], PROFILES) == first
    assert build_strategy(config, SHAPE, 0).plan(3, CLIENTS[:1], PROFILES)[0] == first[0]


def test_random_draws_anew_each_round_and_with_each_seed():
    strategy = build_strategy(configs.RandomExperts(), SHAPE, 0)
    assert strategy.plan(1, CLIENTS, {}) != strategy.plan(2, CLIENTS, {})
    assert strategy.plan(1, CLIENTS, {}) != build_strategy(configs.RandomExperts(), SHAPE, 1).plan(1, CLIENTS, {})


def test_without_exploration_hfedmoe_holds_the_best_by_its_score():
    strategy = build_strategy(configs.HFedMoE(explore=0.0, beta=0.3), SHAPE, 0)
    for client in CLIENTS:
        plan = strategy.plan(1, CLIENTS, PROFILES)[client.client]
        score = PROFILES[client.client].ib_score(0.5, 0.3)
        held = [score[key] for key in plan.trainable]
        assert max(held) == score.max()
        assert plan.trainable == strategy.deploy(1, CLIENTS, PROFILES)[client.client].trainable


def test_beta_zero_ranks_by_importance():
    zero = build_strategy(configs.HFedMoE(beta=0.0), SHAPE, 0)
    importance = build_strategy(configs.HFedMoE(beta=5.0, rank_by="importance"), SHAPE, 0)
    strong = build_strategy(configs.HFedMoE(beta=5.0), SHAPE, 0)
    assert zero.plan(1, CLIENTS, PROFILES) == importance.plan(1, CLIENTS, PROFILES)
    assert zero.plan(1, CLIENTS, PROFILES) != strong.plan(1, CLIENTS, PROFILES)


@pytest.mark.parametrize("config", [configs.HFedMoE(resident="all"), configs.RandomExperts(resident="all")])
def test_in_the_papers_setting_all_train_and_each_batch_chooses_among_the_routed(config):
    strategy = build_strategy(config, SHAPE, 0)
    plan = strategy.plan(1, CLIENTS, PROFILES)[1]
    assert len(plan.trainable) == 16
    routed = np.zeros((2, 8))
    routed[:, :3] = 5
    chosen = strategy.select(profile(9, routed=routed), plan, np.random.default_rng(0))
    assert len(chosen) == CLIENTS[1].batch_experts
    assert all(routed[key] > 0 for key in chosen)


def test_hfedmoe_selects_a_batchs_best_routed_experts():
    strategy = build_strategy(configs.HFedMoE(resident="all", beta=0.0, lam=1.0), SHAPE, 0)
    usage = np.tile(np.array([0.4, 0.3, 0.2, 0.1, 0, 0, 0, 0.0]), (2, 1))
    routed = np.ones((2, 8))
    routed[:, 0] = 0
    plan = uniform_plan((2, 8), Role.TRAIN, 2)
    chosen = strategy.select(profile(usage=usage, routed=routed), plan, np.random.default_rng(0))
    assert {key.expert for key in chosen} == {1}


@pytest.mark.parametrize("config", [configs.FedAvg(), configs.Local()])
def test_unbudgeted_controls_train_everything(config):
    strategy = build_strategy(config, SHAPE, 0)
    plan = strategy.plan(1, CLIENTS, {})[0]
    assert len(plan.trainable) == 16
    assert strategy.select(profile(), plan, np.random.default_rng(0)) == set(plan.trainable)
    assert strategy.federated == (config.name == "fedavg")


def test_blending_moves_only_what_the_client_does_not_hold():
    strategy = build_strategy(configs.HFedMoE(decay=1.0), SHAPE, 0)
    plan = strategy.plan(1, CLIENTS, PROFILES)[0]
    mine, cohort = profile(1), profile(2)
    blended = strategy.blend(mine, plan, cohort)
    for layer in range(2):
        for expert in range(8):
            expected = mine if (layer, expert) in set(plan.present) else cohort
            assert blended.usage[layer, expert] == expected.usage[layer, expert]
    kept = build_strategy(configs.HFedMoE(decay=0.0), SHAPE, 0).blend(mine, plan, cohort)
    assert (kept.usage == mine.usage).all()
