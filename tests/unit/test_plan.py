"""The plan says what a run would ask for, and refuses what cannot work with a remedy that does."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hfedmoe_ray import budget, calibration
from hfedmoe_ray.calibration import Calibration, Cost
from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.data.lengths import Lengths
from hfedmoe_ray.errors import CapacityError
from hfedmoe_ray.estimates import PROCESS_BYTES, predict_memory
from hfedmoe_ray.packing import GIB, NodeCapacity
from hfedmoe_ray.plan import Plan, forecast, plan_experiment
from hfedmoe_ray.types import ModelShape

MIB = 2**20
SHAPE = ModelShape(
    layers=3, experts=16, top_k=4, hidden=384, expert_bytes=296_832, shared_bytes=3 * MIB, frozen_bytes=80 * MIB
)
BIG = replace(SHAPE, expert_bytes=20 * MIB)
"""Experts that make a difference to the memory of a client."""


def machine(cpus: float = 2, gpus: int = 0, memory_gib: int = 16) -> NodeCapacity:
    return NodeCapacity(node="this", name="this", cpus=cpus, gpus=gpus, memory_bytes=memory_gib * GIB)


NODE = machine()


def planned(quickstart: Path, *overrides: str, shape: ModelShape = SHAPE, node=NODE) -> Plan:
    return plan_experiment(load_experiment(quickstart, overrides), shape, [node])


def refused(quickstart: Path, *overrides: str, shape: ModelShape = SHAPE, node=NODE) -> str:
    with pytest.raises(CapacityError) as caught:
        planned(quickstart, *overrides, shape=shape, node=node)
    return str(caught.value)


def test_every_client_is_planned_once_with_the_experts_of_its_tier(quickstart: Path):
    plan = planned(quickstart)
    assert sorted(client for one in plan.tiers for client in one.clients) == list(range(10))
    assert [(one.tier, len(one.clients), one.resident) for one in plan.tiers] == [
        ("phone", 5, 6),
        ("laptop", 3, 12),
        ("server", 2, 24),
    ]


def test_more_experts_need_more_memory_and_more_traffic(quickstart: Path):
    phone, laptop, server = planned(quickstart).tiers
    for less, more in ((phone, laptop), (laptop, server)):
        assert less.memory_bytes < more.memory_bytes
        assert less.bytes_down < more.bytes_down
        assert less.bytes_up < more.bytes_up
    # An expert that trains is held four times: weights, gradient, two moments. Activations come on top.
    assert server.memory_bytes - laptop.memory_bytes > 4 * 12 * SHAPE.expert_bytes
    _, laptop, server = planned(quickstart, "local.batch_size=1", "data.max_length=4").tiers
    assert server.memory_bytes - laptop.memory_bytes == pytest.approx(4 * 12 * SHAPE.expert_bytes, rel=0.01)


@pytest.mark.parametrize("strategy", ["fedavg", "local"])
def test_strategies_without_a_budget_hold_every_expert(quickstart: Path, strategy: str):
    for one in planned(quickstart, f"strategy={strategy}").tiers:
        assert (one.resident, one.present, one.batch) == (48, 48, 48)


def test_the_papers_setting_holds_every_expert_and_trains_the_budget(quickstart: Path):
    assert [(one.resident, one.batch) for one in planned(quickstart, "strategy.resident=all").tiers] == [
        (48, 6),
        (48, 12),
        (48, 24),
    ]


def test_frozen_experts_are_fetched_but_not_sent_back(quickstart: Path):
    frozen = planned(quickstart, "strategy.unselected=frozen").tiers[0]
    absent = planned(quickstart, "strategy.unselected=mean").tiers[0]
    dropped = planned(quickstart, "strategy.unselected=drop").tiers[0]
    assert (frozen.resident, frozen.present) == (6, 48)
    assert frozen.bytes_down - dropped.bytes_down == 42 * SHAPE.expert_bytes
    assert absent.bytes_down - dropped.bytes_down == 48 * 384 * 4
    assert frozen.bytes_up - absent.bytes_up == 42 * 384 * 4


def test_a_round_counts_the_average_cohort(quickstart: Path):
    whole, half = planned(quickstart), planned(quickstart, "clients.per_round=5")
    assert half.round_down == pytest.approx(whole.round_down / 2)
    assert whole.round_up == sum(one.bytes_up * len(one.clients) for one in whole.tiers)


def test_more_clients_than_actors_take_turns(quickstart: Path):
    assert planned(quickstart, "runtime.slots=2").waves == 5
    assert planned(quickstart, "runtime.slots=2", "clients.per_round=5").waves == 3
    assert planned(quickstart, "runtime.slots=2", "clients.per_round=5", "clients.over_select=1.5").waves == 4
    assert planned(quickstart, "actors=dedicated").waves == 1
    assert planned(quickstart, "backend=local").waves == 10


def test_a_round_takes_what_the_busiest_actor_does(quickstart: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HFEDMOE_CACHE", str(tmp_path))
    assert planned(quickstart).seconds is None
    experiment = load_experiment(quickstart)
    step = Cost(fixed=0.1, expert=0.01, example=0.0, routed=0.0)
    calibration.write(
        experiment, experiment.clients.tiers[0], SHAPE, Calibration(peak=step, step=step, tokens=64), gpu=False
    )
    alone, two = planned(quickstart, "backend=local"), planned(quickstart, "runtime.slots=2")
    each = [experiment.local.steps * (0.1 + 0.01 * one.resident) for one in alone.tiers]
    work = sum(seconds * len(one.clients) for seconds, one in zip(each, alone.tiers, strict=True))
    assert alone.seconds == pytest.approx(work)
    assert work / 2 <= two.seconds <= work / 2 + max(each)
    assert planned(quickstart, "actors=dedicated").seconds == pytest.approx(max(each))


def test_ranks_share_what_the_examples_of_a_batch_cost(quickstart: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HFEDMOE_CACHE", str(tmp_path))
    experiment = load_experiment(quickstart)
    step = Cost(fixed=0.0, expert=0.0, example=0.01, routed=0.0)
    calibration.write(
        experiment, experiment.clients.tiers[0], SHAPE, Calibration(peak=step, step=step, tokens=64), gpu=False
    )
    one, gang = (planned(quickstart, f"clients.tiers.2.device={d}", "actors=pooled").tiers[2] for d in (1, 2))
    assert gang.asked.ranks == 2
    assert gang.train_seconds == pytest.approx(one.train_seconds / 2)


def test_the_same_actors_are_planned_as_a_run_would_make(quickstart: Path):
    experiment = load_experiment(quickstart)
    assert planned(quickstart).slots == budget.plan_slots(
        budget.tier_demands(experiment.clients, False), [NODE], "auto"
    )
    assert [slot.client for slot in planned(quickstart, "actors=dedicated", node=NODE).slots] == list(range(10))
    assert planned(quickstart, "backend=local").slots == ()


def test_gpus_are_asked_for_where_there_are_some(quickstart: Path):
    plan = planned(quickstart, node=machine(cpus=8, gpus=1, memory_gib=64))
    assert [one.asked.num_gpus for one in plan.tiers] == [0.1, 0.2, 0.4]


def test_the_advised_share_of_experts_fits(quickstart: Path):
    others = ["clients.tiers.0.memory_gib=9", "clients.tiers.1.memory_gib=9"]
    message = refused(quickstart, *others, shape=BIG)
    assert message.startswith("Clients 2, 7 of tier server would need")
    lowered = re.search(r"lower (clients\.tiers\.2\.experts) from 0.5 to ([0-9.]+)\.", message)
    assert lowered
    fits = planned(quickstart, *others, f"{lowered[1]}={lowered[2]}", shape=BIG).tiers[2]
    # And it is the largest that does.
    experiment = load_experiment(quickstart)
    assert (
        fits.memory_bytes
        <= 2 * GIB
        < predict_memory(experiment, BIG, experiment.clients.tiers[2], fits.resident + 1, fits.resident + 1, gpu=False)
    )


def test_the_advised_memory_fits(quickstart: Path):
    message = refused(quickstart, shape=BIG)
    raised = re.findall(r"(clients\.tiers\.\d\.memory_gib) is \S+\. Raise it to ([0-9.]+)[,;]", message)
    assert len(raised) >= 2
    assert planned(quickstart, *(f"{key}={value}" for key, value in raised), shape=BIG).slots


def test_no_share_of_experts_is_advised_where_none_fits(quickstart: Path):
    message = refused(quickstart, "clients.tiers.0.memory_gib=0.2")
    assert "clients.tiers.0.memory_gib is 0.2" in message
    assert "with fewer experts it would not fit either" in message


@pytest.mark.parametrize(
    ("override", "advice"), [("strategy=fedavg", "fedavg trains every expert"), ("strategy.resident=all", "to budget")]
)
def test_where_the_budget_does_not_limit_memory_the_strategy_is_named(quickstart: Path, override: str, advice: str):
    assert advice in refused(quickstart, override, shape=BIG)


def test_a_machine_that_is_too_small_is_told_what_it_lacks(quickstart: Path):
    message = refused(quickstart, "actors=dedicated", node=machine(cpus=1))
    assert "clients do not fit" in message
    assert "pooled" in message


def test_forecast_follows_the_configured_order(quickstart: Path):
    experiment = load_experiment(quickstart, ["clients.count=1"])
    assert [one.tier for one in forecast(experiment, SHAPE, gpus_available=False)] == ["phone"]


@pytest.mark.parametrize(
    ("upload", "least", "most"), [("bf16", 0.5, 0.5), ("fp16", 0.5, 0.5), ("int8", 0.25, 0.27), ("topk", 0.02, 0.03)]
)
def test_an_update_is_predicted_at_its_precision(quickstart: Path, upload: str, least: float, most: float):
    for whole, one in zip(planned(quickstart).tiers, planned(quickstart, f"wire.upload={upload}").tiers, strict=True):
        assert one.bytes_down == whole.bytes_down
        assert least <= round(one.bytes_up / whole.bytes_up, 3) <= most


@pytest.mark.parametrize(
    ("override", "less"),
    [
        ("clients.tiers.0.micro_batch=4", True),
        ("clients.tiers.0.checkpoint_activations=true", True),
        ("clients.tiers.0.precision=bf16", True),
        ("local.batch_size=32", False),
        ("strategy.unselected=reroute", False),
        ("strategy.unselected=frozen", False),
    ],
)
def test_what_decides_activations_changes_the_prediction(quickstart: Path, override: str, less: bool):
    plain, other = (planned(quickstart, *given).tiers[0].memory_bytes for given in ((), (override,)))
    assert (other < plain) is less


def test_frozen_weights_count_only_where_every_client_has_its_own(quickstart: Path):
    """On a GPU of its own; on one that clients share they are held once, and told apart."""
    huge = replace(SHAPE, frozen_bytes=SHAPE.frozen_bytes + GIB)

    def more(device: float, gpu: bool) -> int:
        experiment = load_experiment(quickstart, [f"clients.tiers.0.device={device}"])
        tier = experiment.clients.tiers[0]
        without, with_ = (predict_memory(experiment, shape, tier, 6, 6, gpu=gpu) for shape in (SHAPE, huge))
        return with_ - without

    assert [more(device, gpu) for device, gpu in ((0.5, False), (1, False), (0.5, True), (1, True))] == [0, 0, 0, GIB]
    shared = [
        forecast(load_experiment(quickstart), shape, gpus_available=True)[0].shared_bytes for shape in (SHAPE, huge)
    ]
    assert shared == [SHAPE.frozen_bytes, huge.frozen_bytes]


def test_what_was_measured_takes_the_place_of_the_arithmetic(quickstart: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HFEDMOE_CACHE", str(tmp_path))
    experiment = load_experiment(quickstart)
    assert not any(one.measured for one in planned(quickstart).tiers)
    found = Calibration(
        peak=Cost(fixed=10 * MIB, expert=2 * MIB, example=MIB, routed=4 * MIB),
        step=Cost(fixed=0.1, expert=0.002, example=0.01, routed=0.02),
        tokens=32,
    )
    calibration.write(experiment, experiment.clients.tiers[0], SHAPE, found, gpu=False)
    plan = planned(quickstart)
    # The quickstart's tiers differ in nothing but their experts.
    assert all(one.measured for one in plan.tiers)
    assert plan.tiers[1].memory_bytes == PROCESS_BYTES + (10 + 2 * 12 + 16 * (1 + 4 * 12 / 48)) * MIB
    # Of texts twice as long as those that were measured, an example counts twice.
    longer = plan_experiment(experiment, SHAPE, [NODE], Lengths(texts=np.full(5, 64)))
    assert longer.tiers[1].memory_bytes == PROCESS_BYTES + (10 + 2 * 12 + 32 * (1 + 4 * 12 / 48)) * MIB
    assert not any(one.measured for one in planned(quickstart, "local.precision=bf16").tiers)
    assert [one.measured for one in planned(quickstart, "clients.tiers.1.precision=bf16").tiers] == [True, False, True]
    # The task head, whose classes a plan does not know, is not part of what it was measured for.
    assert calibration.read(experiment, experiment.clients.tiers[0], replace(SHAPE, shared_bytes=1), gpu=False) == found


@pytest.mark.parametrize(("strategy", "active"), [("fft_moe", (2, 4, 8)), ("flame", (1, 1, 2))])
def test_a_budget_of_active_experts_changes_activations_alone(quickstart: Path, strategy: str, active: tuple[int, ...]):
    """Everyone holds, trains and sends all experts; per token and layer each active one has 2 (H + F) numbers more."""
    plan = planned(quickstart, f"strategy={strategy}")
    assert {(one.resident, one.present, one.batch) for one in plan.tiers} == {(48, 48, 48)}
    (everything,) = {(one.bytes_down, one.bytes_up) for one in planned(quickstart, "strategy=fedavg").tiers}
    assert {(one.bytes_down, one.bytes_up) for one in plan.tiers} == {everything}
    numbers = 16 * 64 * SHAPE.layers * 2 * (SHAPE.hidden + SHAPE.expert_bytes / 4 / (2 * SHAPE.hidden))
    for one, k in zip(plan.tiers, active, strict=True):
        grown = one.memory_bytes - plan.tiers[0].memory_bytes
        assert grown == pytest.approx(4 * numbers * (k - active[0]), abs=2)


def test_measured_activations_grow_with_the_active_experts_too(quickstart: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HFEDMOE_CACHE", str(tmp_path))
    experiment = load_experiment(quickstart, ["strategy=fft_moe"])
    found = Calibration(
        peak=Cost(fixed=10 * MIB, expert=MIB, example=MIB, routed=4 * MIB),
        step=Cost(fixed=0.1, expert=0.002, example=0.01, routed=0.02),
        tokens=32,
    )
    calibration.write(experiment, experiment.clients.tiers[0], SHAPE, found, gpu=False)
    for one, k in zip(planned(quickstart, "strategy=fft_moe").tiers, (2, 4, 8), strict=True):
        assert one.memory_bytes == PROCESS_BYTES + (10 + 48 + 16 * (1 + 4 * k / SHAPE.top_k)) * MIB
    # What was measured of clients that differ in their top-k says nothing of others.
    assert not any(one.measured for one in planned(quickstart, "strategy=fedavg").tiers)
