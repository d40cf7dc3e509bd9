"""The plan says what a run would ask for, and refuses what cannot work with a remedy that does."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from hfedmoe_ray import budget
from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.errors import CapacityError
from hfedmoe_ray.packing import GIB, NodeCapacity
from hfedmoe_ray.plan import Plan, forecast, plan_experiment, predict_memory
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
    # An expert that trains is held four times: weights, gradient, two moments.
    assert server.memory_bytes - laptop.memory_bytes == 4 * 12 * SHAPE.expert_bytes


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
    assert fits.memory_bytes <= 2 * GIB < predict_memory(experiment, BIG, fits.resident + 1, fits.resident + 1)


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
