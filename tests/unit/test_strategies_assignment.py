"""Assigning experts to clients: equal to brute force, within budgets and bounds, whatever the order of clients."""

import itertools

import numpy as np
import pytest

from hfedmoe_ray.strategies.assignment import assign, layer_minimum, mean_holders
from hfedmoe_ray.strategies.scores import mask, top_experts
from hfedmoe_ray.types import ExpertKey


def draw(seed, clients, shape, levels=None):
    """Fitness of clients, [L, E] each: continuous, or of few levels, so that much of it is tied."""
    rng = np.random.default_rng(seed)
    values = rng.random((clients, *shape)) if levels is None else rng.integers(0, levels, (clients, *shape)) / 16
    return {client: values[client] for client in range(clients)}


def holders(assignment, shape):
    return sum(mask(shape, chosen).astype(int) for chosen in assignment.chosen.values())


def total(fitness, chosen):
    return sum(fitness[client][key] for client, keys in chosen.items() for key in keys)


def brute_force(fitness, budgets, shape, lower, upper):
    """(broken bounds, -fitness) of the best assignment with an expert in each layer, by trying all."""
    keys = [ExpertKey(layer, e) for layer in range(shape[0]) for e in range(shape[1])]
    options = [
        [own for own in itertools.combinations(keys, budgets[c]) if len({key.layer for key in own}) == shape[0]]
        for c in fitness
    ]
    best = None
    for choice in itertools.product(*options):
        loads = sum(mask(shape, own).astype(int) for own in choice)
        broken = np.maximum(lower - loads, 0).sum() + np.maximum(loads - upper, 0).sum()
        value = (int(broken), -total(fitness, dict(zip(fitness, choice, strict=True))))
        best = value if best is None else min(best, value)
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("low", "high"), [(0, 9), (1, 2), (1, 1), (2, 2)])
def test_a_tiny_assignment_is_the_best_of_all(seed, low, high):
    # Levels are 1/16 apart: farther than all perturbations together, so what is best must be found exactly.
    shape, fitness, budgets = (2, 3), draw(seed, 3, (2, 3), levels=16), {0: 2, 1: 3, 2: 2}
    lower, upper = np.full(shape, float(low)), np.full(shape, float(high))
    lower[0, 0] = seed % 3  # not all alike
    found = assign(fitness, budgets, scope="global", seed=seed, round=1, lower=lower, upper=upper)
    broken, value = brute_force(fitness, budgets, shape, lower, upper)
    assert found.relaxed == broken
    assert total(fitness, found.chosen) == pytest.approx(-value, abs=1e-12)
    loads = holders(found, shape)
    np.testing.assert_array_equal(found.missing, np.maximum(lower - loads, 0))
    np.testing.assert_array_equal(found.surplus, np.maximum(loads - upper, 0))


@pytest.mark.parametrize("levels", [1, 3, None], ids=["all tied", "few levels", "continuous"])
@pytest.mark.parametrize("scope", ["global", "per_layer"])
def test_budgets_and_bounds_hold_and_nothing_is_fractional(levels, scope):
    """`assign` itself refuses a fractional solution of HiGHS, so that it returns at all shows integrality."""
    shape = (3, 16)
    for seed in range(8):
        fitness = draw(seed, 20, shape, levels)
        budgets = {client: (6, 12, 24)[client % 3] for client in fitness}
        mean = mean_holders(budgets, shape)
        lower, upper = np.full(shape, 0.9 * mean), np.full(shape, 1.1 * mean)
        found = assign(fitness, budgets, scope=scope, seed=seed, round=1, lower=lower, upper=upper)
        assert found.relaxed == 0
        loads = holders(found, shape)
        assert np.floor(0.9 * mean) <= loads.min() <= loads.max() <= np.ceil(1.1 * mean)
        for client, chosen in found.chosen.items():
            assert len(chosen) == budgets[client]
            in_layer = mask(shape, chosen).sum(axis=1)
            assert (in_layer >= layer_minimum(budgets[client], shape, scope)).all()
            assert scope == "global" or np.ptp(in_layer) == 0


@pytest.mark.parametrize("levels", [2, None])
def test_the_order_of_clients_does_not_matter_and_ties_are_drawn_anew(levels):
    shape, budgets = (2, 8), dict.fromkeys(range(10), 4)
    fitness, bounds = draw(3, 10, shape, levels), {"lower": np.full(shape, 2.0), "upper": np.full(shape, 3.0)}
    first = assign(fitness, budgets, scope="global", seed=0, round=1, **bounds).chosen
    for order in (range(9, -1, -1), np.random.default_rng(0).permutation(10)):
        shuffled = {int(client): fitness[client] for client in order}
        assert assign(shuffled, budgets, scope="global", seed=0, round=1, **bounds).chosen == first
    for seed, round in ((0, 2), (1, 1)):
        other = assign(fitness, budgets, scope="global", seed=seed, round=round, **bounds).chosen
        assert (other == first) == (levels is None)
        # Which one of equally good ones is drawn; how good it is does not depend on the draw.
        assert total(fitness, other) == pytest.approx(total(fitness, first), abs=0.04)


@pytest.mark.parametrize("scope", ["global", "per_layer"])
def test_without_bounds_every_client_holds_its_best(scope):
    shape = (3, 8)
    fitness = draw(1, 6, shape)
    fitness[0][0, :2] = fitness[0][1, 0] + np.array([1e-7, -1e-7])  # far closer than ties are perturbed
    budgets = {client: 3 + 2 * client for client in fitness}
    found = assign(fitness, budgets, scope=scope, seed=0, round=1)
    everything = np.ones(shape, dtype=bool)
    assert found.chosen == {c: top_experts(fitness[c], everything, budgets[c], scope) for c in fitness}


def test_bounds_that_cannot_be_kept_are_relaxed_as_little_as_possible_and_told():
    shape, budgets = (2, 4), dict.fromkeys(range(3), 2)
    found = assign(draw(0, 3, shape), budgets, scope="global", seed=0, round=4, lower=np.full(shape, 2.0))
    # Six places for sixteen that are asked for.
    assert found.relaxed == found.missing.sum() == 10
    assert holders(found, shape).max() <= 2
    event = found.event(4)
    assert (event["round"], event["missing"], event["surplus"]) == (4, 10, 0)
    # Every client needs an expert in either layer, and no expert may be held: the budgets win.
    none = assign(draw(0, 3, shape), budgets, scope="global", seed=0, round=4, upper=np.zeros(shape))
    assert none.surplus.sum() == 6
    assert {len(chosen) for chosen in none.chosen.values()} == {2}


def test_what_is_fixed_is_held_and_the_rest_is_best():
    shape, fitness = (2, 4), draw(5, 4, (2, 4))
    worst = {c: frozenset({ExpertKey(*map(int, np.unravel_index(fitness[c].argmin(), shape)))}) for c in fitness}
    budgets = dict.fromkeys(fitness, 3)
    found = assign(fitness, budgets, scope="global", seed=0, round=1, fixed=worst)
    for client, chosen in found.chosen.items():
        assert worst[client] < chosen
        (fixed,) = worst[client]
        # Of the other two, the one the other layer needs and the best that is left.
        others = chosen - worst[client]
        best = max(fitness[client][1 - fixed.layer])
        assert best in {fitness[client][key] for key in others}
    with pytest.raises(ValueError, match="client 2 is to hold 1 of 8 experts, and at least 2"):
        assign(
            fitness,
            budgets | {2: 1},
            scope="global",
            seed=0,
            round=1,
            fixed={2: frozenset({ExpertKey(0, 0), ExpertKey(1, 1)})},
        )
    with pytest.raises(ValueError, match="client 0 is to hold 9 of 8 experts"):
        assign(fitness, budgets | {0: 9}, scope="global", seed=0, round=1)
