"""The mean of low-rank products: exact where it fits the rank, the best approximation where it does not."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfedmoe_ray.strategies.aggregation import Reducer
from hfedmoe_ray.strategies.lora import ProductMean, factor_pairs
from hfedmoe_ray.strategies.rules import RuleSet
from hfedmoe_ray.strategies.scores import uniform_plan
from hfedmoe_ray.types import ClientUpdate, ExpertKey, Role, RoutingProfile, Weights

OUT, IN, RANK = 12, 9, 2
OLD = np.ones((RANK, IN), np.float32), np.zeros((OUT, RANK), np.float32)


def factors(seed, rank=RANK):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(rank, IN)).astype(np.float32), rng.normal(size=(OUT, rank)).astype(np.float32)


def exact(contributions):
    total = sum(weight for _, _, weight in contributions)
    return sum(b.astype(float) @ a.astype(float) * weight for a, b, weight in contributions) / total


def folded(contributions):
    mean = ProductMean()
    for a, b, weight in contributions:
        mean.add(a, b, weight)
    return mean


@settings(deadline=None)
@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=4))
def test_the_mean_is_exact_while_the_ranks_add_up_to_the_target(weights):
    contributions = [(*factors(seed, rank=2), weight) for seed, weight in enumerate(weights)]
    rank = 2 * len(weights)
    old = np.zeros((rank, IN), np.float32), np.zeros((OUT, rank), np.float32)
    a, b = folded(contributions).result(*old)
    np.testing.assert_allclose(b @ a, exact(contributions), atol=2e-5)


@pytest.mark.parametrize("clients", [3, 4, 5, 30])
def test_otherwise_it_is_the_best_approximation(clients):
    """Eckart-Young: what is lost is exactly the discarded singular values. From 5 clients on the stack is not thin."""
    contributions = [(*factors(seed), 1.0 + seed) for seed in range(clients)]
    mean = folded(contributions)
    a, b = mean.result(*OLD)
    assert (a.shape, b.shape) == ((RANK, IN), (OUT, RANK))
    discarded = np.linalg.svd(exact(contributions), compute_uv=False)[RANK:]
    lost = np.linalg.norm(b.astype(float) @ a - exact(contributions))
    assert lost == pytest.approx(np.sqrt((discarded**2).sum()), rel=1e-5)
    np.testing.assert_allclose(mean.mean(), exact(contributions), atol=1e-12)


def test_memory_is_bounded_whatever_the_cohort():
    mean = ProductMean()
    for seed in range(200):
        mean.add(*factors(seed), 1.0)
        held = sum(a.size + b.size for a, b, _ in mean._stack) + (0 if mean._dense is None else mean._dense.size)
        assert held <= OUT * IN + (OUT + IN) * (min(OUT, IN) + RANK)


@settings(deadline=None)
@given(st.permutations(range(6)))
def test_the_order_of_clients_does_not_matter_and_equal_orders_are_equal(order):
    contributions = [(*factors(seed), 1.0 + seed) for seed in range(6)]
    permuted = [contributions[i] for i in order]
    (a, b), (c, d), (e, f) = (folded(each).result(*OLD) for each in (contributions, permuted, permuted))
    np.testing.assert_allclose(b @ a, d @ c, atol=1e-5)
    assert np.array_equal(c, e)
    assert np.array_equal(d, f)


def test_a_single_contributor_is_unchanged_and_nobody_changes_nothing():
    a, b = factors(0)
    for contributions in ([(a, b, 3.0)], [(a, b, 3.0), (*factors(1), 0.0)]):
        new_a, new_b = folded(contributions).result(*OLD)
        assert np.array_equal(new_a, a)
        assert np.array_equal(new_b, b)
    untouched = folded([(a, b, 0.0)]).result(*OLD)
    assert untouched[0] is OLD[0]
    assert untouched[1] is OLD[1]
    twice = folded([(a, b, 1.0), (a, b, 2.0)]).result(*OLD)
    np.testing.assert_allclose(twice[1] @ twice[0], b @ a, atol=1e-5)


def test_factors_of_nothing_can_still_learn():
    """Where the mean is 0, or of lower rank, A keeps independent rows: else neither factor would get a gradient."""
    start = [(factors(seed)[0], np.zeros((OUT, RANK), np.float32), 1.0) for seed in (0, 0, 1)]
    a, b = folded(start).result(*OLD)
    assert not b.any()
    np.testing.assert_allclose(a @ a.T, np.eye(RANK) / 3, atol=1e-6)


def test_pairs_are_found_by_name():
    names = ["up.lora_A", "up.lora_B", "q.lora_A.default.weight", "q.lora_B.default.weight", "gate", "lone.lora_A"]
    assert factor_pairs(names) == {
        "up.lora_A": "up.lora_B",
        "q.lora_A.default.weight": "q.lora_B.default.weight",
    }


KEY = ExpertKey(0, 0)
PLAN = uniform_plan((1, 1), Role.TRAIN)
ATTENTION = "q.lora_A.default.weight", "q.lora_B.default.weight"


def update(client, a, b, samples):
    ones = np.ones((1, 1))
    return ClientUpdate(
        client=client,
        samples=samples,
        experts={KEY: {"up.lora_A": a, "up.lora_B": b}},
        shared={**dict(zip(ATTENTION, (a, b), strict=True)), "gate": a, "norm": b},
        trained={KEY: 1},
        profile=RoutingProfile(usage=ones, specific=ones, kl=ones, routed=ones, tokens=1),
        means={},
    )


def reduced(average, updates):
    a, b = OLD
    old = Weights(
        version=0,
        shared={**dict(zip(ATTENTION, OLD, strict=True)), "gate": a, "norm": b},
        experts={KEY: {"up.lora_A": a, "up.lora_B": b}},
    )
    reducer = Reducer(old=old, router_layers={"gate": 0}, layers=1, rules=RuleSet(), average=average)
    for one in updates:
        reducer.add(one, PLAN)
    return reducer.result()


def test_the_reducer_averages_products_or_factors_as_told():
    """Two clients who learned the same product with opposite signs in both factors: averaging factors loses it."""
    a, b = factors(0)
    updates = [update(0, a, b, 5), update(1, -a, -b, 5)]
    svd, plain = reduced("svd", updates), reduced("factors", updates)
    for new in (svd, plain):
        assert not new.shared["gate"].any()
        assert not new.shared["norm"].any()
    for tensors, names in ((svd.experts[KEY], ("up.lora_A", "up.lora_B")), (svd.shared, ATTENTION)):
        np.testing.assert_allclose(tensors[names[1]] @ tensors[names[0]], b @ a, atol=1e-5)
    assert list(svd.experts[KEY]) == ["up.lora_A", "up.lora_B"]
    assert not any(plain.experts[KEY][name].any() for name in plain.experts[KEY])
    assert not any(plain.shared[name].any() for name in ATTENTION)


def test_averaged_products_are_weighted_like_everything_else():
    sent = [(*factors(seed), samples) for seed, samples in enumerate((1, 30, 7))]
    new = reduced("svd", [update(client, a, b, samples) for client, (a, b, samples) in enumerate(sent)])
    expected = folded(sent).result(*OLD)
    assert np.array_equal(new.experts[KEY]["up.lora_A"], expected[0])
    assert np.array_equal(new.shared[ATTENTION[1]], expected[1])


def test_a_product_few_took_part_in_is_held_back_towards_the_published_one():
    """Exactly so while the ranks of the two fit the rank of one: here the client changed one of the two directions."""
    key, other = ExpertKey(0, 0), ExpertKey(0, 1)
    a, b = factors(0)
    moved = b.copy()
    moved[:, 1] += factors(1)[1][:, 1]
    old = Weights(version=0, shared={}, experts={key: {"w.lora_A": a, "w.lora_B": b}, other: {}})
    reducer = Reducer(old=old, router_layers={}, layers=1, rules=RuleSet(anchor=1.0), average="svd")
    plan = uniform_plan((1, 2), Role.TRAIN)
    for client, sent in ((0, {key: {"w.lora_A": a, "w.lora_B": moved}}), (1, {})):
        reducer.add(
            ClientUpdate(
                client=client,
                samples=10,
                experts=sent,
                shared={},
                trained=dict.fromkeys(sent, 1),
                profile=None,
                means={},
            ),
            plan,
        )
    new = reducer.result().experts[key]
    np.testing.assert_allclose(new["w.lora_B"] @ new["w.lora_A"], (b + moved) / 2 @ a, atol=1e-5)
