"""What a stale update changed is laid onto the newest weights, and counts the less the staler it is."""

from dataclasses import replace

import numpy as np
import pytest
from made_up_updates import KEYS, LAYERS, PLAN, ROUTERS, update, weights

from hfedmoe_ray.strategies.aggregation import Reducer
from hfedmoe_ray.strategies.rules import RuleSet
from hfedmoe_ray.strategies.staleness import discount, rebased

TRAINED = KEYS[:3]


def test_a_discount_falls_from_one_as_the_exponent_says():
    assert discount(0, 0.5) == 1.0
    assert discount(3, 0.5) == 0.5
    assert discount(5, 0.0) == 1.0
    assert [discount(tau, 1.0) for tau in range(3)] == pytest.approx([1, 1 / 2, 1 / 3])


def test_a_change_is_scaled_and_laid_onto_the_newest_weights():
    start, now, sent = weights(0), replace(weights(1), version=6), update(7, TRAINED)
    laid = rebased(sent, start, now, 0.5)
    assert set(laid.experts) == set(TRAINED)
    for key in TRAINED:
        expected = now.experts[key]["w"] + 0.5 * (sent.experts[key]["w"].astype(np.float64) - start.experts[key]["w"])
        assert (laid.experts[key]["w"] == expected.astype(np.float32)).all()
    for name, value in sent.shared.items():
        assert laid.shared[name] == pytest.approx(now.shared[name] + 0.5 * (value - start.shared[name]), abs=1e-6)
        assert laid.shared[name].dtype == np.float32


def test_an_update_of_the_newest_weights_keeps_its_bits():
    sent = update(7, TRAINED)
    assert rebased(sent, weights(0), weights(0), 0.5) is sent


def test_the_staler_an_update_the_less_it_moves_what_is_averaged():
    """And an expert nobody trained stays as it is."""
    start, fresh, old = weights(0), update(1, TRAINED), update(2, TRAINED)
    moved = []
    for tau in (1, 3, 8):
        now = replace(start, version=start.version + tau)
        reducer = Reducer(old=now, router_layers=ROUTERS, layers=LAYERS, rules=RuleSet())
        reducer.add(fresh, PLAN)
        alone = fresh.experts[KEYS[0]]["w"].astype(np.float64)
        reducer.add(rebased(old, start, now, 0.5), PLAN)
        after = reducer.result()
        # The mean of both less half of the fresh one's change is half of what the stale one's change counts.
        half = after.experts[KEYS[0]]["w"] - now.experts[KEYS[0]]["w"] - (alone - now.experts[KEYS[0]]["w"]) / 2
        moved.append(float(np.abs(half).sum()))
        assert after.experts[KEYS[-1]]["w"] is now.experts[KEYS[-1]]["w"]
    assert moved == sorted(moved, reverse=True)
    assert moved[0] / moved[1] == pytest.approx(2**0.5, rel=1e-4)
    assert moved[1] / moved[2] == pytest.approx(1.5, rel=1e-4)
