"""Robust rules: what no minority can move, what agrees with brute force, and what the mean keeps to the bit."""

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up_updates import EXPERTS, KEYS, LAYERS, PLAN, ROUTERS, update, weights
from pydantic import ValidationError
from tiny_federation import experiment, final_weights, run

from hfedmoe_ray.config.robust import Robust
from hfedmoe_ray.strategies.aggregation import Reducer
from hfedmoe_ray.strategies.robust import RobustMeanOutputs, RobustReducer, change_norm, class_means, mean_outputs
from hfedmoe_ray.strategies.robust_rules import (
    Contribution,
    combined,
    krum_scores,
    median,
    nearest,
    suspects,
    trimmed_mean,
    weiszfeld,
)
from hfedmoe_ray.strategies.rules import PlainExperts, RuleSet, TrainedExperts, WithTheirExpert
from hfedmoe_ray.types import Prototypes, Weights
from hfedmoe_ray.wire import checksum

RULES = ["median", "trimmed_mean", "krum", "multi_krum", "geometric_median"]
BY_ROW = RuleSet(routers=WithTheirExpert(experts=TrainedExperts()))


def reduced(updates, options, rules=None):
    reducer = RobustReducer(
        old=weights(), router_layers=ROUTERS, layers=LAYERS, rules=rules or RuleSet(), options=options
    )
    for one in updates:
        reducer.add(one, PLAN)
    return reducer, reducer.result()


def tensors_of(one):
    return [*one.shared.values(), *(tensor for tensors in one.experts.values() for tensor in tensors.values())]


# ------------------------------------------------------------------------------------------------------- the rules


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 1000))
def test_the_median_of_equal_weights_is_numpys_and_of_whole_weights_that_of_copies(count, seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, 4)).astype(np.float32)
    np.testing.assert_allclose(median(values, np.full(count, 0.1)), np.median(values.astype(float), axis=0), rtol=1e-12)
    copies = rng.integers(1, 4, size=count)
    expected = np.median(np.repeat(values.astype(float), copies, axis=0), axis=0)
    np.testing.assert_allclose(median(values, copies.astype(float)), expected, rtol=1e-12)


@settings(deadline=None)
@given(st.integers(1, 12), st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.4]), st.integers(0, 1000))
def test_the_trimmed_mean_is_scipys_where_it_cuts_whole_values(count, share, seed):
    values = np.random.default_rng(seed).normal(size=(count, 3))
    whole = round(share * count)
    if whole != pytest.approx(share * count):
        whole = 0
        share = 0.0
    expected = scipy.stats.trim_mean(values, whole / count + 1e-9, axis=0)
    np.testing.assert_allclose(trimmed_mean(values, np.full(count, 2.0), share), expected, rtol=1e-9, atol=1e-12)


def test_krum_scores_are_those_of_the_definition():
    points = np.random.default_rng(0).normal(size=(7, 5))
    squared = ((points[:, None] - points) ** 2).sum(axis=-1)
    for hostile in range(3):
        expected = [sorted(np.delete(squared[i], i))[: 7 - hostile - 2] for i in range(7)]
        np.testing.assert_allclose(krum_scores(squared, hostile), [sum(row) for row in expected])


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 4), st.integers(0, 1000))
def test_mixing_takes_the_closest_and_leaves_out_the_rest(count, hostile, seed):
    rng = np.random.default_rng(seed)
    points, weight = rng.normal(size=(count, 3)), rng.uniform(0.5, 2.0, size=count)
    kept = max(1, count - hostile)
    rows = nearest(((points[:, None] - points) ** 2).sum(axis=-1), weight, count - kept)
    for i, row in enumerate(rows):
        closest = sorted(range(count), key=lambda j: float(np.linalg.norm(points[i] - points[j])))[:kept]
        expected = np.zeros(count)
        expected[closest] = weight[closest] / weight[closest].sum()
        np.testing.assert_allclose(row, expected, rtol=1e-12)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_with_mixing_who_flips_signs_among_clients_that_differ_has_no_part_in_the_result(rule, clip):
    """Changes of eight honest clients have little in common, as those of short training on other data do; clipping two
    that send four times the contrary makes these as long as all others."""
    rng, old = np.random.default_rng(0), weights()
    updates = [update(client, KEYS) for client in range(10)]
    common = [rng.normal(size=tensor.shape) for tensor in tensors_of(old)]
    for one in updates:
        for tensor, start, shared in zip(tensors_of(one), tensors_of(old), common, strict=True):
            change = 0.4 * shared + rng.normal(size=tensor.shape)
            tensor[:] = start + change * (-4.0 if one.client in (3, 6) else 1.0)
    honest = tensors_of(reduced([one for one in updates if one.client not in (3, 6)], Robust(clip_median=clip))[1])
    start = tensors_of(old)

    def off(options: Robust) -> float:
        moved = tensors_of(reduced(updates, options)[1])
        away = sum(((a - b) ** 2).sum() for a, b in zip(moved, honest, strict=True))
        return float(np.sqrt(away / sum(((b - c) ** 2).sum() for b, c in zip(honest, start, strict=True))))

    assert off(Robust(rule=rule, clip_median=clip)) < 0.25
    if rule in ("median", "trimmed_mean", "krum", "geometric_median"):
        assert off(Robust(rule=rule, clip_median=clip, mix=False)) > 0.25


@pytest.mark.parametrize("seed", range(3))
def test_weiszfeld_finds_the_least_sum_of_distances(seed):
    rng = np.random.default_rng(seed)
    points, weight = rng.normal(size=(6, 3)), rng.uniform(0.5, 2.0, size=6)
    found = weiszfeld(points @ points.T, weight) @ points

    def total(place):
        return (weight * np.linalg.norm(points - place, axis=1)).sum()

    best = scipy.optimize.minimize(total, points.mean(axis=0), method="Nelder-Mead", options={"xatol": 1e-9})
    assert total(found) == pytest.approx(best.fun, rel=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_equal_contributions_come_back_bit_for_bit(rule, count):
    updates = [update(client, KEYS, seed=5, samples=client + 1) for client in range(count)]
    for rules in (None, BY_ROW):
        _, new = reduced(updates, Robust(rule=rule), rules)
        assert all((a == b).all() for a, b in zip(tensors_of(new), tensors_of(weights(5)), strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_which_client_has_which_number_does_not_matter(rule):
    results = []
    for order in list(permutations(range(4)))[::5]:
        updates = [update(client, KEYS, seed=order[client] + 50, samples=order[client] + 3) for client in range(4)]
        results.append(tensors_of(reduced(updates, Robust(rule=rule))[1]))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("lie", [1e3, -1e6])
def test_two_of_seven_cannot_move_it_out_of_the_others_range(rule, lie):
    """By number for the median, the trimmed mean and krum's; within a bound of the spread for the geometric median."""
    honest = [update(client, KEYS) for client in range(5)]
    hostile = [update(9 + i, KEYS) for i in range(2)]
    for one in hostile:
        for tensor in tensors_of(one):
            np.multiply(tensor, np.float32(lie), out=tensor)
    _, new = reduced([*honest, *hostile], Robust(rule=rule, hostile=0.3))
    for place, tensor in enumerate(tensors_of(new)):
        values = np.stack([tensors_of(one)[place] for one in honest])
        slack = 3 * (values.max() - values.min()) if rule == "geometric_median" else 1e-6
        assert (tensor >= values.min(axis=0) - slack).all()
        assert (tensor <= values.max(axis=0) + slack).all()
    mean = tensors_of(reduced([*honest, *hostile], Robust())[1])
    assert max(abs(tensor).max() for tensor in mean) > abs(lie) / 10


def test_of_three_one_may_be_hostile_and_of_two_none_can_be_told():
    assert [suspects(count, 0.2) for count in range(1, 12)] == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3]
    assert [suspects(count, 0.0) for count in range(1, 4)] == [0, 0, 0]
    assert all(2 * suspects(count, 0.49) < count for count in range(1, 30))


def test_krum_does_not_follow_who_weighs_most():
    updates = [update(0, KEYS, samples=5), update(1, KEYS, samples=5), update(2, KEYS, samples=500)]
    for tensor in tensors_of(updates[2]):
        np.multiply(tensor, np.float32(1e4), out=tensor)
    largest = max(abs(tensor).max() for one in updates[:2] for tensor in tensors_of(one))
    for rule in ("krum", "multi_krum"):
        assert max(abs(tensor).max() for tensor in tensors_of(reduced(updates, Robust(rule=rule))[1])) <= largest


@pytest.mark.parametrize("rule", RULES)
def test_one_client_cannot_take_over_the_head_of_class_prototypes(rule):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 8))
    labels = np.repeat(np.arange(4), 50)
    features = centres[labels] + 0.3 * rng.normal(size=(200, 8))

    def right(options: Robust, lie: float) -> float:
        classes = class_means(options)
        for client in range(5):
            mine = slice(client, None, 5)
            sums = np.stack([features[mine][labels[mine] == label].sum(axis=0) for label in range(4)])
            sums *= lie if client == 0 else 1.0
            classes.add(Prototypes(sums=sums.astype(np.float32), counts=np.full(4, 10, np.float32)))
        weight, bias = classes.head(np.zeros((4, 8), np.float32), np.zeros(4, np.float32))
        return float(((features @ weight.T + bias).argmax(axis=1) == labels).mean())

    assert right(Robust(), 1.0) > 0.95
    assert right(Robust(), -1e3) < 0.5
    assert right(Robust(rule=rule), -1e3) > 0.95


def test_krum_takes_one_update_whole_for_each_expert():
    updates = [update(client, KEYS, seed=0 if client < 3 else client) for client in range(5)]
    for one in updates[:3]:  # three that agree, almost
        for tensor in tensors_of(one):
            np.add(tensor, np.float32(0.001 * one.client), out=tensor)
    _, new = reduced(updates, Robust(rule="krum", mix=False))
    for key in KEYS:
        assert any((new.experts[key]["w"] == one.experts[key]["w"]).all() for one in updates[:3])


def test_each_expert_has_its_own_contributors():
    """One client trains the first expert, four the second: the first is that client's, the second their median."""
    updates = [update(0, KEYS[:2]), *(update(client, KEYS[1:2]) for client in range(1, 4))]
    _, new = reduced(updates, Robust(rule="median", mix=False))
    assert (new.experts[KEYS[0]]["w"] == updates[0].experts[KEYS[0]]["w"]).all()
    expected = median(np.stack([one.experts[KEYS[1]]["w"] for one in updates]), np.full(4, 10.0))
    assert (new.experts[KEYS[1]]["w"] == expected.astype(np.float32)).all()
    old = weights()
    assert all(
        new.experts[key]["w"] is not None and (new.experts[key]["w"] == old.experts[key]["w"]).all() for key in KEYS[2:]
    )


# ------------------------------------------------------------------------------------------------ bounds and thresholds


@pytest.mark.parametrize("rule", ["mean", *RULES])
@pytest.mark.parametrize("rules", [None, BY_ROW])
def test_experts_of_too_few_contributors_keep_their_bytes_and_so_do_their_rows(rule, rules):
    updates = [update(client, KEYS[: client + 1]) for client in range(3)]
    reducer, new = reduced(updates, Robust(rule=rule, min_contributors=2), rules)
    old = weights()
    assert reducer.withheld == {KEYS[2]}
    assert (new.experts[KEYS[2]]["w"] == old.experts[KEYS[2]]["w"]).all()
    assert (new.experts[KEYS[1]]["w"] != old.experts[KEYS[1]]["w"]).any()
    row_moved = (new.shared["gate.0"] != old.shared["gate.0"]).any(axis=1)
    assert row_moved.tolist() == ([True] * EXPERTS if rules is None else [True, True, False, False])
    if rules is not None:
        assert reducer.rows["gate.0"].tolist() == [True, True, False, False]


def test_who_took_part_by_use_alone_is_no_contributor():
    """With HFedMoE's literal rule somebody counts who sends no value; that does not hide the one who does."""
    plain = RuleSet(experts=PlainExperts())
    updates = [update(0, KEYS[:1]), update(1, KEYS[1:3]), update(2, KEYS[1:2])]
    reducer, _ = reduced(updates, Robust(min_contributors=2), plain)
    assert reducer.withheld == {KEYS[0], KEYS[2]}


def test_a_clipped_change_has_the_norm_and_the_direction():
    one, old = update(0, KEYS), weights()
    norm = change_norm(one, old)
    by_hand = np.sqrt(sum(((a - b) ** 2).sum() for a, b in zip(tensors_of(one), tensors_of(old), strict=True)))
    assert norm == pytest.approx(float(by_hand), rel=1e-6)
    reducer, new = reduced([one], Robust(clip=norm / 4))
    for moved, whole, start in zip(tensors_of(new), tensors_of(one), tensors_of(old), strict=True):
        np.testing.assert_allclose(moved - start, (whole - start) / 4, rtol=1e-3, atol=1e-6)
    assert reducer.clipped == 1
    reducer, new = reduced([one], Robust(clip=norm * 1.01))
    assert reducer.clipped == 0
    assert all((a == b).all() for a, b in zip(tensors_of(new), tensors_of(one), strict=True))


def test_the_median_norm_bounds_who_shouts():
    updates = [update(client, KEYS, seed=client) for client in range(1, 6)]
    old = weights()
    for tensor, start in zip(tensors_of(updates[4]), tensors_of(old), strict=True):
        tensor[:] = start + 100 * (tensor - start)
    norms = sorted(change_norm(one, old) for one in updates)
    reducer, new = reduced(updates, Robust(clip_median=1.0))
    assert reducer.clipped == 2  # the one above the middle, and the one that shouts
    shares = [(a - b) for a, b in zip(tensors_of(new), tensors_of(old), strict=True)]
    assert np.sqrt(sum((one.astype(float) ** 2).sum() for one in shares)) <= norms[2] * 1.001


def test_the_mean_with_nothing_to_do_is_the_plain_reducer_bit_for_bit():
    updates = [update(client, KEYS[client:], samples=client + 1) for client in range(4)]
    for rules in (RuleSet(), BY_ROW, RuleSet(anchor=0.75)):
        plain = Reducer(old=weights(), router_layers=ROUTERS, layers=LAYERS, rules=rules)
        for one in updates:
            plain.add(one, PLAN)
        _, new = reduced(updates, Robust(clip=1e9), rules)
        assert all((a == b).all() for a, b in zip(tensors_of(new), tensors_of(plain.result()), strict=True))


@pytest.mark.parametrize("rule", RULES)
def test_an_anchor_holds_back_as_it_does_the_mean(rule):
    old = weights()
    updates = [update(0, KEYS[:1]), *(update(client, []) for client in range(1, 4))]
    _, new = reduced(updates, Robust(rule=rule), RuleSet(anchor=1.0))
    expected = old.experts[KEYS[0]]["w"] + (updates[0].experts[KEYS[0]]["w"] - old.experts[KEYS[0]]["w"]) / 4
    np.testing.assert_allclose(new.experts[KEYS[0]]["w"], expected, rtol=1e-5, atol=1e-6)


def test_mean_outputs_are_combined_by_the_rule():
    means = RobustMeanOutputs(Robust(rule="median", mix=False))
    for client, value in enumerate([1.0, 2.0, 1e6]):
        one = update(client, [])
        one = type(one)(**{**vars(one), "means": {KEYS[0]: (np.full(3, value, np.float32), 5)}})
        means.add(one)
    old = weights().means
    new = means.result(old)
    assert (new[KEYS[0]] == 2.0).all()
    assert (new[KEYS[1]] == old[KEYS[1]]).all()


@pytest.mark.parametrize("rule", ["mean", "median"])
def test_what_too_few_have_measured_is_not_published(rule):
    """A mean output keeps its value, and a class's prototype is that of a class which nobody has."""
    options = Robust(rule=rule, min_contributors=2)
    means = mean_outputs(options)
    for client in range(2):
        measured = {key: (np.full(3, 7.0, np.float32), 5) for key in KEYS[: client + 1]} | {
            KEYS[2]: (np.full(3, 7.0, np.float32), 5 * client)
        }
        means.add(replace(update(client, []), means=measured))
    old = weights().means
    new = means.result(old)
    assert [bool((new[key] == 7.0).all()) for key in KEYS[:3]] == [True, False, False]
    assert all((new[key] == old[key]).all() for key in KEYS[1:])

    sums = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
    classes, without = class_means(options), class_means(Robust())
    for client, counts in enumerate(np.array([[5, 5, 5], [5, 5, 0]], np.float32)):
        classes.add(Prototypes(sums=sums[client] * (counts > 0)[:, None], counts=counts))
        shared = np.array([True, True, False])
        without.add(Prototypes(sums=sums[client] * shared[:, None], counts=counts * shared))
    heads = [one.head(np.zeros((3, 4), np.float32), np.zeros(3, np.float32)) for one in (classes, without)]
    assert (heads[0][0][2] == 0.0).all()
    for a, b in zip(*heads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_rule_is_applied_to_changes_not_to_values():
    """Moving the published value moves the result by as much."""
    rng = np.random.default_rng(3)
    changes = rng.normal(size=(5, 4))
    for rule in RULES:
        results = [
            combined(
                [Contribution(tensors={"w": start + change}, weight=1.0) for change in changes],
                {"w": np.full(4, start)},
                Robust(rule=rule),
            )["w"]
            - start
            for start in (0.0, 64.0)
        ]
        np.testing.assert_allclose(results[0], results[1], atol=1e-9)


# -------------------------------------------------------------------------------------------------------- in a run


@pytest.mark.parametrize("rule", ["mean", *RULES])
def test_a_run_by_a_rule_repeats_to_the_bit_and_resumes(rule: str, sources: Path, tmp_path: Path):
    made = experiment(sources, robust={"rule": rule, "min_contributors": 2, "clip_median": 1.0}, rounds=2)
    context, summary, recorder = run(made, tmp_path / "run")
    assert summary["status"] == "finished"
    assert all(report.robust["clipped"] >= 1 for report in recorder.rounds if report.round)
    stopped, _, _ = run(made, tmp_path / "stopped", stop_after=1)
    again, _, _ = run(made, tmp_path / "stopped", resume=True)
    assert stopped.run_dir == again.run_dir
    assert checksums(final_weights(again)) == checksums(final_weights(context))


def checksums(made: Weights) -> list[str]:
    return [checksum(made.shared), *(checksum(tensors) for tensors in made.experts.values())]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"strategy": "local"}, "averages nothing"),
        ({"strategy": {"name": "hfedmoe", "gate_weights": "literal"}}, "do not sum to 1"),
        ({"model": {"lora": {"rank": 2, "average": "svd"}, "trainable": "experts"}}, "average: factors"),
        ({"secure": {}, "strategy": "fedavg"}, "sees no single update"),
    ],
)
def test_what_it_does_not_go_with_is_said(changes: dict[str, Any], says: str, sources: Path):
    plain = experiment(sources)
    model = plain.model.model_dump() | changes.pop("model", {})
    with pytest.raises(ValidationError, match=says):
        experiment(sources, robust={"rule": "median"}, model=model, **changes)
