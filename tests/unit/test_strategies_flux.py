"""Flux: its budgets, clusters, utilities and plans as functions of arrays."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError
from tiny_federation import experiment

from hfedmoe_ray.config import strategies as configs
from hfedmoe_ray.config.lora import Lora
from hfedmoe_ray.strategies import build_strategy
from hfedmoe_ray.strategies.flux import frequency
from hfedmoe_ray.strategies.merging import cosine_clusters, layer_budgets, merge_absent, principal_components
from hfedmoe_ray.types import ClientInfo, ClientUpdate, ExpertKey, ModelShape, RoutingProfile, Weights

L, E = 3, 8
SHAPE = ModelShape(layers=L, experts=E, top_k=2, hidden=4, expert_bytes=80, shared_bytes=1, frozen_bytes=1)
CLIENTS = tuple(
    ClientInfo(client=number, tier="made-up", resident_experts=held, batch_experts=batch, samples=10)
    for number, (held, batch) in enumerate([(3, 3), (8, 8), (12, 4), (24, 24)])
)


def profile(client: int) -> RoutingProfile:
    rng = np.random.default_rng(client)
    usage = rng.dirichlet(np.ones(E), size=L)
    routed = rng.multinomial(200, usage).astype(np.float64)
    return RoutingProfile(usage=usage, specific=usage, kl=usage, routed=routed, tokens=100)


PROFILES = {client.client: profile(client.client) for client in CLIENTS}


def weights(seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    experts = {
        ExpertKey(layer, e): {"up": rng.normal(size=(6, 4)).astype(np.float32), "bias": rng.normal(size=6)}
        for layer in range(L)
        for e in range(E)
    }
    return Weights(version=0, shared={}, experts=experts)


def made(**options: object):
    strategy = build_strategy(configs.Flux(**options), SHAPE, 0)
    strategy.study(weights())
    return strategy


def test_layer_budgets_are_the_closest_to_their_shares_that_add_up():
    """Against every division of the total: none is nearer to the exact shares."""
    rng = np.random.default_rng(0)
    for total, caps in itertools.product((3, 5, 9, 14), ([8, 8, 8], [2, 8, 5], [1, 7, 3])):
        f = rng.dirichlet(np.ones(E), size=L)
        budgets = layer_budgets(total, f, caps)
        goal = min(total, sum(caps))
        share = np.array([3, 2, 1]) / f.var(axis=1)
        share = total * share / share.sum()
        possible = [b for b in itertools.product(*(range(1, cap + 1) for cap in caps)) if sum(b) == goal]
        distance = {b: np.abs(np.array(b) - share).sum() for b in possible}
        assert budgets in possible
        assert distance[budgets] == pytest.approx(min(distance.values()))


def test_layer_budgets_favour_low_layers_and_even_use():
    f = np.tile(np.array([[0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]]), (L, 1))
    low, middle, high = layer_budgets(12, f, [E] * L)
    assert (low, middle, high) == (6, 4, 2)
    uneven = f.copy()
    uneven[0] = [0.9, 0.1, 0, 0, 0, 0, 0, 0]
    assert layer_budgets(12, uneven, [E] * L)[0] < low
    assert layer_budgets(12, f, [E, 0, E])[1] == 0
    assert layer_budgets(1, f, [E] * L) == (1, 1, 1)


def test_clusters_find_directions_whatever_the_order_of_points():
    rng = np.random.default_rng(0)
    centres = np.linalg.qr(rng.normal(size=(6, 6)))[0][:4]
    truth = rng.permutation(np.repeat(np.arange(4), 5))
    # Lengths differ widely, directions little: only cosine tells the groups.
    points = (centres[truth] + 0.05 * rng.normal(size=(20, 6))) * rng.uniform(0.1, 10, size=(20, 1))
    labels = cosine_clusters(points, 4)
    assert partition(labels) == partition(truth)
    for _ in range(5):
        order = rng.permutation(20)
        assert partition(cosine_clusters(points[order], 4), order) == partition(truth)
    np.testing.assert_array_equal(labels, cosine_clusters(points.copy(), 4))


def partition(labels: np.ndarray, names: np.ndarray | None = None) -> set[frozenset[int]]:
    names = np.arange(len(labels)) if names is None else names
    return {frozenset(names[labels == label].tolist()) for label in set(labels.tolist())}


def test_clusters_of_random_points_do_not_depend_on_their_order():
    rng = np.random.default_rng(1)
    for k in (1, 2, 3, 5, 9):
        points = rng.normal(size=(9, 4))
        order = rng.permutation(9)
        found = partition(cosine_clusters(points, k))
        assert partition(cosine_clusters(points[order], k), order) == found
        assert len(found) <= k
    assert len(partition(cosine_clusters(rng.normal(size=(9, 4)), 9))) == 9
    assert (cosine_clusters(np.zeros((5, 3)), 3) == 0).all()


def test_principal_components_keep_all_distances_and_merge_copies():
    held = weights().experts
    points = principal_components(held, 1, E)
    rows = np.stack([np.concatenate([a.reshape(-1) for a in held[ExpertKey(1, e)].values()]) for e in range(E)])
    rows = rows.astype(np.float64) - rows.mean(axis=0)
    np.testing.assert_allclose(points @ points.T, rows @ rows.T, atol=1e-9)
    assert principal_components(held, 1, 2).shape == (E, 2)
    copies = {key: held[ExpertKey(key.layer, key.expert % 2)] for key in held}
    found = cosine_clusters(principal_components(copies, 0, 8), 5)
    assert partition(found) == {frozenset({0, 2, 4, 6}), frozenset({1, 3, 5, 7})}
    alike = dict.fromkeys(held, held[ExpertKey(0, 0)])
    assert (principal_components(alike, 0, 8) == 0).all()


def test_absent_experts_are_each_merged_once_in_proportion_to_their_use():
    absent = np.random.default_rng(0).random((L, E)) < 0.7
    absent[2] = False
    f = frequency(PROFILES[0])
    points = [principal_components(weights().experts, layer, 8) for layer in range(L)]
    merged = merge_absent(absent, points, f, 5)
    members = [key for one in merged for key in one.keys]
    assert sorted(members) == [ExpertKey(*map(int, key)) for key in np.argwhere(absent)]
    assert len(merged) <= 5
    for one in merged:
        assert sum(one.shares) == pytest.approx(1)
        used = np.array([f[key] for key in one.keys])
        # Experts that no token chose weigh alike.
        np.testing.assert_allclose(one.shares, used / used.sum() if used.any() else np.ones(len(used)) / len(used))
    assert max(len(one.members) for one in merged) > 1


def test_before_the_first_round_utility_is_frequency_and_then_knows_gradients():
    strategy = made()
    f = frequency(PROFILES[1])
    np.testing.assert_array_equal(strategy.utility(1, PROFILES[1]), f)
    seen = np.zeros((L, E))
    seen[0, 2], seen[1, 5] = 9.0, 1.0
    strategy.observe(1, {1: update(1, seen)}, {})
    expected = 2.0 * f  # the mean of the two known norms, where nothing is known
    expected[0, 2], expected[1, 5] = 3 * f[0, 2], 1 * f[1, 5]
    np.testing.assert_allclose(strategy.utility(1, PROFILES[1]), expected)
    again = np.zeros((L, E))
    again[0, 2] = 4.0
    strategy.observe(2, {1: update(1, again)}, {})
    expected = 1.5 * f
    expected[0, 2], expected[1, 5] = 2 * f[0, 2], 1 * f[1, 5]
    np.testing.assert_allclose(strategy.utility(1, PROFILES[1]), expected)
    np.testing.assert_array_equal(strategy.utility(0, PROFILES[0]), frequency(PROFILES[0]))


def update(client: int, squared: np.ndarray) -> ClientUpdate:
    return ClientUpdate(
        client=client,
        samples=1,
        experts={},
        shared={},
        trained={},
        profile=None,
        means={},
        signals={"gradient": squared},
    )


def test_plans_train_the_most_useful_and_explore_others_within_the_memory_budget():
    strategy = made()
    trained_by_round = []
    for round in (1, 4, 9):
        plans = strategy.plan(round, CLIENTS, PROFILES)
        for client in CLIENTS:
            plan = plans[client.client]
            u = strategy.utility(client.client, PROFILES[client.client])
            outside = [u[key] for key in u_keys() if key not in set(plan.trainable)]
            assert 1 <= len(plan.trainable) <= client.batch_experts
            assert not outside or min(u[key] for key in plan.trainable) >= max(outside)
            assert plan.absent == "merge"
            assert len(plan.present) + len(plan.merged) / 4 <= max(client.resident_experts, 1 + L / 4)
            assert {one.layer for one in plan.merged} == {layer for layer, row in enumerate(plan.roles) if 0 in row}, (
                "a layer without a stand-in"
            )
        trained_by_round.append(sum(len(plan.trainable) for plan in plans.values()))
    assert trained_by_round == sorted(trained_by_round)
    assert trained_by_round[0] < trained_by_round[-1]
    explored = {strategy.plan(round, CLIENTS, PROFILES)[1].roles for round in range(20, 40)}
    assert len(explored) > 5, "the same experts are explored in every round"


def u_keys() -> list[ExpertKey]:
    return list(SHAPE.keys())


def test_epsilon_grows_and_a_device_that_holds_all_merges_nothing_away():
    strategy = made(epsilon=0.4, epsilon_last=0.8, epsilon_rounds=4)
    assert [round(strategy.epsilon(t), 3) for t in (1, 2, 3, 5, 9)] == [0.4, 0.5, 0.6, 0.8, 0.8]
    everything = replace(CLIENTS[3], resident_experts=100)
    plan = strategy.plan(1, [everything], PROFILES)[3]
    assert all(len(one.members) == 1 for one in plan.merged)
    assert len(plan.present) + len(plan.merged) == L * E


def test_deployed_clients_hold_their_most_useful_experts_and_train_none():
    strategy = made()
    for client, plan in strategy.deploy(2, CLIENTS, PROFILES).items():
        u = strategy.utility(client, PROFILES[client])
        assert not plan.trainable
        best = sorted(u_keys(), key=lambda key: (-u[key], key))[: len(plan.present)]
        assert sorted(best) == list(plan.present)


def test_gradients_that_zero_hides_cannot_be_measured(tmp_path):
    tier = {"name": "any", "share": 1, "experts": 0.5, "device": 0.1, "zero_stage": 1}
    with pytest.raises(ValidationError, match="leave `zero_stage` out of the tiers"):
        experiment(tmp_path, strategy="flux", clients={"count": 4, "tiers": [tier]})


def test_merging_and_low_rank_factors_are_refused_together(tmp_path):
    made = experiment(tmp_path, strategy="flux")
    model = made.model.model_copy(update={"lora": Lora()})
    with pytest.raises(ValidationError, match="strategy flux merges experts as whole weights"):
        experiment(tmp_path, strategy="flux", model=model.model_dump())
