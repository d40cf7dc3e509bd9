"""Reduction: conservation, bit-identity of the untouched, and the weights of each rule."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_updates import EXPERTS, HIDDEN, KEYS, LAYERS, PLAN, ROUTERS, update, weights

from hfedmoe_ray.strategies.aggregation import ClassMeans, MeanOutputs, Reducer
from hfedmoe_ray.strategies.rules import (
    GateWeights,
    RuleSet,
    SparsityAware,
    TrainedExperts,
    examples_per_layer,
)
from hfedmoe_ray.types import ClientUpdate, Prototypes


def reduce(updates, rule=None, router=examples_per_layer, old=None, *, literal=False, anchor=0.0):
    reducer = Reducer(
        old=old or weights(),
        router_layers=ROUTERS,
        layers=LAYERS,
        rules=RuleSet(experts=rule or TrainedExperts(), routers=router, literal_router=literal, anchor=anchor),
    )
    for one in updates:
        reducer.add(one, PLAN)
    return reducer.result()


def test_experts_nobody_trained_are_the_same_object():
    old = weights()
    new = reduce([update(0, KEYS[:2]), update(1, KEYS[1:3])], old=old)
    for key in KEYS[3:]:
        assert new.experts[key]["w"] is old.experts[key]["w"]
    assert all((new.experts[key]["w"] != old.experts[key]["w"]).any() for key in KEYS[:3])
    assert new.version == old.version + 1


def test_an_expert_one_client_trained_is_exactly_that_clients():
    one, two = update(0, KEYS[:1], samples=7), update(1, KEYS[1:2], samples=1000)
    new = reduce([one, two])
    assert (new.experts[KEYS[0]]["w"] == one.experts[KEYS[0]]["w"]).all()


@settings(deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8))
def test_equal_contributions_come_back_bit_for_bit(samples):
    updates = [update(client, KEYS, seed=5, samples=count) for client, count in enumerate(samples)]
    new = reduce(updates)
    expected = weights(5)
    assert all((new.experts[key]["w"] == expected.experts[key]["w"]).all() for key in KEYS)
    assert all((new.shared[name] == expected.shared[name]).all() for name in expected.shared)


@settings(deadline=None)
@given(st.permutations(range(4)))
def test_the_mean_does_not_depend_on_which_client_has_which_number(order):
    updates = [update(client, KEYS, samples=client + 1) for client in range(4)]
    plain, permuted = reduce(updates), reduce([updates[i] for i in order])
    for key in KEYS:
        np.testing.assert_allclose(plain.experts[key]["w"], permuted.experts[key]["w"], rtol=1e-6)


def test_fedavg_is_the_mean_weighted_by_examples():
    one, two = update(0, KEYS, samples=1), update(1, KEYS, samples=3)
    new = reduce([one, two])
    key = KEYS[0]
    np.testing.assert_allclose(
        new.experts[key]["w"], 0.25 * one.experts[key]["w"] + 0.75 * two.experts[key]["w"], rtol=1e-6
    )
    np.testing.assert_allclose(new.shared["head"], 0.25 * one.shared["head"] + 0.75 * two.shared["head"], rtol=1e-6)


@pytest.mark.parametrize("anchor", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("participants", [0, 1, 2, 3, 4])
def test_an_expert_moves_by_its_mean_or_less_where_few_took_part(anchor, participants):
    old = weights()
    updates = [update(client, KEYS[: client < participants], samples=10 * client + 1) for client in range(4)]
    new = reduce(updates, old=old, anchor=anchor).experts[KEYS[0]]["w"]
    plain = reduce(updates, old=old).experts[KEYS[0]]["w"]
    before = old.experts[KEYS[0]]["w"]
    if participants == 0:
        assert new is before
    elif participants >= 4 * anchor:
        assert (new == plain).all(), "enough took part"
    else:
        share = participants / (4 * anchor)
        np.testing.assert_allclose(new - before, share * (plain - before), rtol=1e-4, atol=1e-6)


def test_usage_below_the_threshold_keeps_a_client_out_of_an_expert():
    low = np.full((LAYERS, EXPERTS), 1 / EXPERTS)
    low[0, 0] = 0.01
    rule = SparsityAware(threshold=1 / EXPERTS)
    one, two = update(0, KEYS, usage=low), update(1, KEYS)
    new = reduce([one, two], rule, GateWeights(experts=rule, lam=0.5))
    assert (new.experts[KEYS[0]]["w"] == two.experts[KEYS[0]]["w"]).all()


def test_literal_participation_drags_an_expert_to_its_old_value_and_ours_does_not():
    old = weights()
    trained, masked = update(0, KEYS), update(1, KEYS[1:])
    ours = SparsityAware(threshold=0.1)
    paper = SparsityAware(threshold=0.1, literal=True)
    key = KEYS[0]
    assert (reduce([trained, masked], ours, old=old).experts[key]["w"] == trained.experts[key]["w"]).all()
    np.testing.assert_allclose(
        reduce([trained, masked], paper, old=old).experts[key]["w"],
        0.5 * trained.experts[key]["w"] + 0.5 * old.experts[key]["w"],
        rtol=1e-6,
    )


def test_normalised_gate_weights_keep_the_routers_size_and_literal_ones_shrink_it_every_round():
    rule = SparsityAware(threshold=0.1)
    for literal in (False, True):
        current = weights()
        size = np.linalg.norm(current.shared["gate.0"])
        for _ in range(3):
            same = [ClientUpdate(**{**vars(update(client, KEYS)), "shared": current.shared}) for client in range(3)]
            current = reduce(same, rule, GateWeights(experts=rule, lam=0.5), old=current, literal=literal)
        ratio = np.linalg.norm(current.shared["gate.0"]) / size
        assert (ratio < 0.1) if literal else (ratio == pytest.approx(1.0, rel=1e-6))


def test_a_router_nobody_takes_part_in_keeps_its_bytes():
    old = weights()
    rule = SparsityAware(threshold=0.1)
    only_first_layer = [key for key in KEYS if key.layer == 0]
    new = reduce([update(0, only_first_layer)], rule, GateWeights(experts=rule, lam=0.5), old=old)
    assert new.shared["gate.1"] is old.shared["gate.1"]
    assert (new.shared["gate.0"] != old.shared["gate.0"]).any()


def test_mean_outputs_are_weighted_by_tokens_and_others_kept():
    old = weights().means
    means = MeanOutputs()
    for client, (value, tokens) in enumerate([(1.0, 1), (4.0, 2)]):
        means.add(
            ClientUpdate(
                **{**vars(update(client, [])), "means": {KEYS[0]: (np.full(HIDDEN, value, np.float32), tokens)}}
            )
        )
    new = means.result(old)
    np.testing.assert_allclose(new[0, 0], 3.0)
    assert (new[1] == old[1]).all()
    assert (old[0, 0] != new[0, 0]).any(), "the old means must not be written"


def test_class_means_from_many_clients_make_the_nearest_mean_classifier():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, size=200)
    features = rng.normal(size=(200, 5)) + 2 * rng.normal(size=(4, 5))[labels]
    classes = ClassMeans()
    for part in np.array_split(np.arange(200), 7):
        one_hot = np.eye(4)[labels[part]]
        classes.add(
            Prototypes(
                sums=(one_hot.T @ features[part]).astype(np.float32), counts=one_hot.sum(axis=0).astype(np.float32)
            )
        )
    weight, bias = classes.head(np.zeros((4, 5), np.float32), np.zeros(4, np.float32))
    means = np.stack([features[labels == c].mean(axis=0) for c in range(3)])
    nearest = ((features[:, None] - means) ** 2).sum(axis=-1).argmin(axis=1)
    logits = features @ weight.T + bias
    assert (logits[:, :3].argmax(axis=1) == nearest).all()
    assert not weight[3].any(), "a class that nobody has keeps a zero row"
    own = logits[np.arange(200), labels]
    assert 2 < (own - logits[:, :3].mean(axis=1)).mean() < 10, "sure, but not beyond correction"


def test_without_prototypes_the_head_stays_as_it_was():
    weight, bias = np.ones((2, 3), np.float32), np.ones(2, np.float32)
    assert ClassMeans().head(weight, bias) == (weight, bias)
