"""A client of two ranks does what it would do as one, and both ranks end with the same weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from moe_models import save_bert, save_mixtral
from ranked_clients import Pair, alone, client_of_two, listening, pair
from tiny_federation import experiment, write_sources

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.moe.prepare import initial_weights
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.train.ranks import Ranks, caused_by_another_rank
from hfedmoe_ray.types import ClientTask, ClientUpdate, ExpertPlan, Role, TaskWeights
from hfedmoe_ray.wire import unpack_update

STEPS, EXPERTS, LAYERS = 4, 6, 2
CHOOSING = ExpertPlan(roles=((Role.TRAIN,) * 4 + (Role.FROZEN, Role.ABSENT),) * LAYERS, absent="drop", batch_budget=3)
EVERYTHING = ExpertPlan(roles=((Role.TRAIN,) * EXPERTS,) * LAYERS)
HFEDMOE = {"name": "hfedmoe", "tau": 0.5}
FEDPROX = {"name": "fedprox", "mu": 0.5}
MEASURING = {"name": "flux"}
FITNESS = {"name": "flex_moe", "fitness": "loss"}
TOLERANCE = {"bert": 5e-5, "mixtral": 5e-7}
"""For nineteen of twenty numbers (see `gap`), which each step moves by up to 1e-3. BERT has more gradients that are
rounding alone, out of which Adam makes steps of full length."""


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """Sources whose models have no dropout: ranks draw it for themselves."""
    del cache  # set before anything is prepared
    root = tmp_path_factory.mktemp("dry")
    write_sources(root)
    save_bert(root / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    save_mixtral(root / "mixtral")
    return root


@pytest.fixture(scope="module")
def two() -> Iterator[Pair]:
    with pair() as joined:
        yield joined


def prepared(sources: Path, root: Path, family: str, strategy: dict[str, Any], devices: int, **tier: Any) -> RunContext:
    batch = tier.pop("batch", 5)
    one = {"name": "any", "share": 1, "experts": 1, "device": devices} | tier
    made = experiment(
        sources,
        family,
        strategy=strategy,
        clients={"count": 4, "tiers": [one]},
        local={"steps": STEPS, "batch_size": batch, "learning_rate": 1e-3, "cache": "off"},
    )
    return prepare_run(made, root / f"run-{devices}")


def task_of(context: RunContext, plan: ExpertPlan, **fields: Any) -> tuple[ClientTask, TaskWeights]:
    weights = initial_weights(context.model, "experts", None)
    needed = TaskWeights(shared=weights.shared, experts={key: weights.experts[key] for key in plan.present})
    values = {"kind": "train", "round": 1, "client": 0, "seed": 0, "version": 0} | fields
    return ClientTask(plan=plan, **values), needed


def gap(one: ClientUpdate, other: ClientUpdate) -> float:
    """How far nineteen of twenty trained numbers at least lie from the other's."""
    pairs = [(one.shared[name], other.shared[name]) for name in other.shared]
    pairs += [
        (one.experts[key][name], other.experts[key][name]) for key in other.experts for name in other.experts[key]
    ]
    return float(np.quantile(np.concatenate([np.abs(a - b).ravel() for a, b in pairs]), 0.95))


@pytest.mark.parametrize("family", ["bert", "mixtral"])
@pytest.mark.parametrize(
    ("strategy", "plan", "tier"),
    [
        (HFEDMOE, CHOOSING, {}),
        (HFEDMOE, CHOOSING, {"zero_stage": 1}),
        (HFEDMOE, CHOOSING, {"zero_stage": 2}),
        (HFEDMOE, CHOOSING, {"micro_batch": 2}),
        (HFEDMOE, CHOOSING, {"batch": 1}),
        ({"name": "fedavg"}, EVERYTHING, {}),
        ({"name": "fedavg"}, EVERYTHING, {"zero_stage": 2, "micro_batch": 2, "checkpoint_activations": True}),
        (FEDPROX, EVERYTHING, {"micro_batch": 2}),
        (MEASURING, CHOOSING, {}),
        (FITNESS, EVERYTHING, {}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_two_ranks_are_one_within_the_rounding_of_sums(  # noqa: PLR0917 - fixtures and parameters
    two: Pair, dry: Path, tmp_path: Path, family: str, strategy: dict[str, Any], plan: ExpertPlan, tier: dict[str, Any]
):
    ranked, single = (prepared(dry, tmp_path, family, strategy, devices, **tier) for devices in (2, 1))
    task, weights = task_of(ranked, plan)
    payload, told = alone(single, task, weights)
    expected = unpack_update(payload, told)
    payload, metrics, experts = two.work(ranked, task, weights)
    update = unpack_update(payload, metrics)
    assert experts[0] == experts[1] == metrics.after, "the ranks' weights have parted"
    assert metrics.trained == told.trained
    assert metrics.trained
    assert (metrics.tokens, metrics.examples) == (told.tokens, told.examples)
    assert metrics.loss == pytest.approx(told.loss, rel=TOLERANCE[family])
    assert update.profile is not None
    assert expected.profile is not None
    assert np.array_equal(update.profile.routed, expected.profile.routed)
    for name in ("usage", "specific", "kl"):
        np.testing.assert_allclose(getattr(update.profile, name), getattr(expected.profile, name), atol=1e-3)
    assert update.means.keys() == expected.means.keys()
    for key, (mean, tokens) in expected.means.items():
        assert update.means[key][1] == tokens
        np.testing.assert_allclose(update.means[key][0], mean, atol=2e-2)
    assert update.signals.keys() == expected.signals.keys()
    for signal, measured in expected.signals.items():
        np.testing.assert_allclose(update.signals[signal], measured, rtol=5e-3)
    assert gap(update, expected) <= TOLERANCE[family]


@pytest.mark.parametrize("stage", [0, 1])
def test_a_client_of_one_rank_is_served_by_the_first_of_two_to_the_same_bits(
    two: Pair, dry: Path, tmp_path: Path, stage
):
    single = prepared(dry, tmp_path, "mixtral", HFEDMOE, 1, zero_stage=stage)
    task, weights = task_of(single, CHOOSING)
    expected, _ = alone(single, task, weights)
    assert two.first_alone(single, task, weights) == expected


def test_two_ranks_make_the_same_bits_again(two: Pair, dry: Path, tmp_path: Path):
    ranked = prepared(dry, tmp_path, "bert", HFEDMOE, 2, zero_stage=2)
    task, weights = task_of(ranked, CHOOSING)
    (one, _, _), (again, _, _) = (two.work(ranked, task, weights) for _ in range(2))
    assert one == again


def test_ranks_evaluate_what_they_make_their_own_together(two: Pair, dry: Path, tmp_path: Path):
    ranked, single = (prepared(dry, tmp_path, "mixtral", HFEDMOE, devices) for devices in (2, 1))
    task, weights = task_of(ranked, CHOOSING, kind="personalise", split="own_test")
    _, metrics, (ours, theirs) = two.work(ranked, task, weights)
    _, told = alone(single, task, weights)
    assert ours == theirs
    assert (metrics.correct, metrics.examples) == (told.correct, told.examples)
    assert metrics.trained == told.trained


def test_ranks_meet_on_this_machine_alone(two: Pair):
    found = [one.submit(listening).result(timeout=30) for one in (two.first, two.second)]
    assert found[0]
    assert all(address in ("127.0.0.1", "::1") for address in found[0] + found[1])


@pytest.mark.parametrize("gone", [0, 1])
def test_the_others_fail_at_once_where_a_rank_dies(dry: Path, tmp_path: Path, gone: int):
    ranked = prepared(dry, tmp_path, "mixtral", HFEDMOE, 2)
    task, weights = task_of(ranked, CHOOSING)
    with pair() as joined:
        ends = joined.start(ranked, task, weights, dying=gone)
        with pytest.raises(RuntimeError) as caught:
            ends[1 - gone].result(timeout=30)
        assert caused_by_another_rank(caught.value)
        assert ends[gone].exception(timeout=30) is not None


def test_a_rank_waits_no_longer_than_it_was_told_for_one_that_is_silent(dry: Path, tmp_path: Path):
    ranked = prepared(dry, tmp_path, "mixtral", HFEDMOE, 2)
    task, weights = task_of(ranked, CHOOSING)
    with pair(patience=3.0) as joined:
        with pytest.raises(RuntimeError, match="Timed out") as caught:
            joined.first.submit(client_of_two, 0, ranked, task, weights).result(timeout=60)
        assert caused_by_another_rank(caught.value)


def test_a_rank_takes_a_slice_of_a_batch_and_all_of_them_take_all():
    ranks = []
    for number in range(3):
        ranks.append(Ranks())
        ranks[-1].rank, ranks[-1].size = number, 3
    for count in range(1, 8):
        shares = [one.share(np.arange(count)) for one in ranks]
        assert np.concatenate(shares).tolist() == list(range(count))
        assert max(map(len, shares)) == len(shares[0]) == ranks[0].largest_share(count)
