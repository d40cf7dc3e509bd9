"""Choosing experts under a budget (eq. 15)."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hfedmoe_ray.strategies.scores import explore, mask, resident_plan, top_experts, uniform_plan
from hfedmoe_ray.types import ExpertKey, Role

SCORES = hnp.arrays(np.float64, (3, 4), elements=st.floats(-1, 1, width=16))
ALLOWED = hnp.arrays(np.bool_, (3, 4))


@given(SCORES, ALLOWED, st.integers(0, 12))
def test_a_choice_keeps_the_budget_and_the_allowed_experts(score, allowed, budget):
    for scope in ("global", "per_layer"):
        chosen = top_experts(score, allowed, budget, scope)
        assert len(chosen) <= budget
        assert all(allowed[key] for key in chosen)


@given(SCORES, ALLOWED, st.integers(3, 12))
def test_a_global_choice_is_the_best_among_those_with_an_expert_in_every_layer(score, allowed, budget):
    chosen = top_experts(score, allowed, budget, "global")
    possible = [ExpertKey(int(layer), int(e)) for layer, e in zip(*np.nonzero(allowed), strict=True)]
    layers = {key.layer for key in possible}
    assert {key.layer for key in chosen} == layers
    size = min(budget, len(possible))
    best = max(
        sum(score[key] for key in subset)
        for subset in itertools.combinations(possible, size)
        if {key.layer for key in subset} == layers
    )
    assert len(chosen) == size
    assert sum(score[key] for key in chosen) == pytest.approx(best)


def test_ties_go_to_the_lower_layer_and_expert():
    chosen = top_experts(np.zeros((2, 3)), np.ones((2, 3), dtype=bool), 3, "global")
    assert chosen == {ExpertKey(0, 0), ExpertKey(0, 1), ExpertKey(1, 0)}


def test_per_layer_scope_spends_the_budget_evenly_whatever_the_scores():
    score = np.array([[9.0, 8.0, 7.0], [0.3, 0.2, 0.1]])
    assert top_experts(score, np.ones_like(score, dtype=bool), 4, "per_layer") == {
        ExpertKey(0, 0),
        ExpertKey(0, 1),
        ExpertKey(1, 0),
        ExpertKey(1, 1),
    }
    assert (
        len(top_experts(score, np.ones_like(score, dtype=bool), 4, "global") & {ExpertKey(0, e) for e in range(3)}) == 3
    )


def test_exploration_keeps_the_budget_and_the_layers_and_meets_its_share_on_average():
    rng = np.random.default_rng(0)
    score = rng.random((3, 16))
    chosen = top_experts(score, np.ones((3, 16), dtype=bool), 6, "global")
    replaced = 0
    for _ in range(500):
        explored = explore(chosen, score, 0.1, rng)
        assert sorted(key.layer for key in explored) == sorted(key.layer for key in chosen)
        replaced += len(chosen - explored)
    assert replaced / (500 * 6) == pytest.approx(0.1, abs=0.02)
    assert explore(chosen, score, 0.0, np.random.default_rng(1)) == chosen


@pytest.mark.parametrize(
    ("unselected", "role"), [("frozen", Role.FROZEN), ("mean", Role.ABSENT), ("drop", Role.ABSENT)]
)
def test_a_resident_plan_gives_each_expert_its_role(unselected, role):
    chosen = frozenset({ExpertKey(0, 1), ExpertKey(1, 2)})
    plan = resident_plan((2, 3), chosen, unselected, 2)
    assert set(plan.trainable) == chosen
    assert len(plan.with_role(role)) == 4
    assert (mask((2, 3), plan.trainable) == np.array([[0, 1, 0], [0, 0, 1]], dtype=bool)).all()


def test_a_uniform_plan_is_uniform():
    assert len(uniform_plan((2, 3), Role.FROZEN).present) == 6
    assert uniform_plan((2, 3), Role.FROZEN).trainable == ()
