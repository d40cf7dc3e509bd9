"""Intervals and tests, against numbers worked out by hand and against scipy computed another way."""

import itertools

import numpy as np
import pytest
from scipy import stats

from hfedmoe_ray.comparison.outcome import coefficient_of_variation
from hfedmoe_ray.comparison.statistics import best_of, compare_with, estimate, holm, paired_p


def test_an_interval_worked_out_by_hand():
    # s = 1, n = 3, t(0.975, 2) = 4.302653: 4.302653 / sqrt(3)
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.half_width == pytest.approx(2.484138, abs=1e-6)


@pytest.mark.parametrize("n", [2, 5, 30])
def test_intervals_are_those_of_scipy(n: int):
    values = np.random.default_rng(n).normal(0.6, 0.1, n)
    found = estimate(values.tolist())
    low, high = stats.t.interval(0.95, n - 1, loc=values.mean(), scale=stats.sem(values))
    assert found.mean - found.half_width == pytest.approx(low)
    assert found.mean + found.half_width == pytest.approx(high)


def test_a_single_value_has_no_interval_and_nothing_no_mean():
    assert estimate([0.4]).half_width is None
    assert estimate([]) is None


def test_the_paired_test_is_a_one_sample_test_of_differences():
    first, second = np.random.default_rng(1).normal(size=(2, 6))
    assert paired_p(first.tolist(), second.tolist()) == pytest.approx(stats.ttest_1samp(first - second, 0).pvalue)


def test_pairs_without_spread_have_an_answer_too():
    assert paired_p([0.5, 0.25, 0.75], [0.5, 0.25, 0.75]) == 1.0
    assert paired_p([1.5, 1.25], [0.5, 0.25]) is None
    assert paired_p([0.3, 0.5, 0.7], [0.2, 0.4, 0.6]) is None, "equal differences, but for rounding"
    assert set(compare_with("a", {"a": {0: 2.0, 1: 3.0}, "b": {0: 1.0, 1: 2.0}, "c": {0: 0.0, 1: 2.5}})) == {"c"}


def test_holm_worked_out_by_hand():
    # 0.01 * 4, 0.02 * 3, 0.03 * 2 (raised to 0.06), 0.04 * 1 (raised to 0.06)
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_rejects_what_the_step_down_procedure_rejects():
    draw = np.random.default_rng(0)
    for size in range(1, 7):
        p_values = (draw.random(size) ** 3).tolist()
        for level in (0.01, 0.05, 0.2):
            rejected = set()
            for rank, index in enumerate(np.argsort(p_values)):
                if p_values[index] > level / (size - rank):
                    break
                rejected.add(int(index))
            assert {i for i, p in enumerate(holm(p_values)) if p <= level} == rejected


def test_each_is_tested_against_the_best_over_the_seeds_they_share():
    values = {
        "a": {0: 0.5, 1: 0.6, 2: 0.7},
        "b": {0: 0.4, 1: 0.55, 2: 0.5},
        "c": {0: 0.1, 2: 0.25},
        "d": {1: 0.9},
    }
    assert best_of(values, "high") == "a", "one lucky seed is not the best"
    assert best_of(values, "low") == "b"
    found = compare_with("a", values)
    assert set(found) == {"b", "c"}
    p_b = stats.ttest_rel([0.5, 0.6, 0.7], [0.4, 0.55, 0.5]).pvalue
    p_c = stats.ttest_rel([0.5, 0.7], [0.1, 0.25]).pvalue
    assert (found["b"].p, found["c"].p) == pytest.approx((p_b, p_c))
    assert (found["b"].n, found["c"].n) == (3, 2)
    assert found["b"].difference == pytest.approx(-0.35 / 3)
    smaller, larger = sorted([p_b, p_c])
    assert sorted([found["b"].p_holm, found["c"].p_holm]) == pytest.approx([2 * smaller, max(2 * smaller, larger)])


def test_nobody_is_best_at_nothing():
    assert best_of({"a": {}, "b": {}}, "high") is None
    assert best_of({}, "low") is None


def test_the_load_s_variation_depends_on_the_shares_alone():
    counts = [4, 0, 2, 2]
    assert coefficient_of_variation(counts) == pytest.approx(np.std(counts) / np.mean(counts))
    for order in itertools.permutations(counts):
        assert coefficient_of_variation([3 * count for count in order]) == pytest.approx(2**0.5 / 2)
    assert coefficient_of_variation([0, 0]) is None
