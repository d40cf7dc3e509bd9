"""Budgets become resources, counts and places by arithmetic that can be checked without a cluster."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfedmoe_ray.budget import (
    GPU_CLIENT_CPUS,
    SlotSpec,
    TierDemand,
    expert_counts,
    plan_actors,
    plan_dedicated,
    plan_slots,
    resources,
    tier_demands,
    tier_of,
)
from hfedmoe_ray.config.schema import Clients, Experiment, Tier
from hfedmoe_ray.errors import CapacityError
from hfedmoe_ray.packing import GIB, NodeCapacity, Packing, ResourceSpec
from hfedmoe_ray.types import ModelShape


def tier(**keys: object) -> Tier:
    return Tier.model_validate({"name": "phone", "share": 1.0, "experts": 0.25, "device": 0.1, "memory_gib": 1} | keys)


def node(cpus: float = 2, gpus: int = 0, gib: float = 16, name: str = "n0", **labels: str) -> NodeCapacity:
    return NodeCapacity(node=name, name=name, cpus=cpus, gpus=gpus, memory_bytes=int(gib * GIB), labels=labels)


def spec(cpus: float = 0.0, gpus: float = 0.0, gib: float = 0.0, **labels: str) -> ResourceSpec:
    return ResourceSpec(num_cpus=cpus, num_gpus=gpus, memory_bytes=int(gib * GIB), labels=labels)


def demand(name: str, asked: ResourceSpec, clients: int = 4) -> TierDemand:
    return TierDemand(tier=name, clients=clients, work=float(clients), resources=asked)


THREE = [
    demand("phone", spec(0.1, gib=1), 5),
    demand("laptop", spec(0.2, gib=1.5), 3),
    demand("server", spec(0.4, gib=2), 2),
]


def sizes(slots: tuple[SlotSpec, ...]) -> list[float]:
    return [slot.resources.num_cpus for slot in slots]


# ---------------------------------------------------------------------------------------------------- one client


def gang(ranks: int, cpus: float = 0.0, gpus: float = 0.0, gib: float = 0.0) -> ResourceSpec:
    return replace(spec(cpus, gpus, gib), ranks=ranks)


def test_a_client_of_several_whole_devices_has_a_rank_on_each():
    assert resources(tier(device=2), False) == gang(2, 2, gib=2)
    assert resources(tier(device=2), True) == gang(2, 2 * GPU_CLIENT_CPUS, 2, gib=2)
    assert resources(tier(device=2, num_cpus=0.4), False) == gang(2, 0.4, gib=2)
    assert resources(tier(num_gpus=4), True).ranks == 4
    assert resources(tier(device=2, num_gpus=1), True).ranks == 1
    assert resources(tier(device=1), True).ranks == 1
    assert str(resources(tier(device=2), True)) == "2 ranks of 1 GPU, 0.25 CPU, 1.0 GiB"


def test_a_gang_serves_gangs_of_its_size_and_single_clients_that_fit_its_first_rank():
    pair = gang(2, 0.4, gib=2)
    assert pair.covers(gang(2, 0.2, gib=2))
    assert pair.covers(spec(0.2, gib=1))
    assert not pair.covers(spec(0.3, gib=1)), "it would not fit one rank"
    assert not gang(4, 4, gib=4).covers(pair)
    assert not spec(8, gib=8).covers(pair)
    assert pair.joined(spec(0.3, gib=1)) == gang(2, 0.6, gib=2)
    assert pair.joined(gang(3, 3)) is None


def test_all_gpus_of_a_gang_are_on_one_node():
    clients = {"count": 2, "tiers": [tier(device=2).model_dump()]}
    experiment = Experiment.model_validate(
        {"name": "x", "clients": clients, "model": {"source": "package:none"}, "data": {"source": "none.jsonl"}}
    )
    nodes = [node(8, 1, name="one"), node(8, 2, name="two"), node(8, 1, name="other")]
    assert [(slot.node, slot.resources.ranks) for slot in plan_actors(experiment, nodes)] == [("two", 2)]
    with pytest.raises(CapacityError, match="2 ranks of 1 GPU"):
        plan_actors(experiment, [nodes[0], nodes[2]])
    assert Counter(slot.node for slot in plan_actors(experiment, [node(8, 4)])) == {"n0": 2}


def test_slots_that_gangs_of_other_sizes_would_share_are_refused():
    pair, four = demand("pair", gang(2, 2, gib=2)), demand("four", gang(4, 4, gib=4))
    assert len(plan_slots([pair, four], [node(8)], 2)) == 2
    with pytest.raises(CapacityError, match="numbers of whole devices"):
        plan_slots([pair, four], [node(8)], 1)


def test_device_is_a_share_of_a_core_or_of_a_gpu():
    assert resources(tier(device=0.25), False) == spec(0.25, gib=1)
    assert resources(tier(device=0.25), True) == spec(GPU_CLIENT_CPUS, 0.25, gib=1)


def test_explicit_resources_override_the_device():
    assert resources(tier(num_cpus=2), False) == spec(2, gib=1)
    assert resources(tier(num_cpus=2, device=0.5), True) == spec(2, 0.5, gib=1)
    assert resources(tier(num_gpus=0, device=0.5), True) == spec(0.5, gib=1)
    assert resources(tier(num_gpus=1), False) == spec(GPU_CLIENT_CPUS, 1, gib=1)


def clients(count: int, shares: list[float]) -> Clients:
    tiers = [{"name": f"t{i}", "share": share, "experts": 0.5} for i, share in enumerate(shares)]
    return Clients.model_validate({"count": count, "tiers": tiers})


@given(st.integers(1, 200), st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_tiers_follow_their_shares_in_every_stretch_of_clients(count: int, parts: list[int]):
    shares = [part / sum(parts) for part in parts]
    names = [one.name for one in tier_of(clients(count, shares))]
    assert len(names) == count
    for stop in range(count + 1):
        seen = Counter(names[:stop])
        for i, share in enumerate(shares):
            assert abs(seen[f"t{i}"] - share * stop) < len(shares) + 1
    for i, share in enumerate(shares):
        assert abs(names.count(f"t{i}") - share * count) < 1


def test_tiers_are_interleaved():
    names = [one.name for one in tier_of(clients(10, [0.5, 0.3, 0.2]))]
    assert Counter(names) == {"t0": 5, "t1": 3, "t2": 2}
    assert names != sorted(names)
    assert len(set(names[:4])) == 3


def test_expert_counts_round_down_and_leave_one_a_layer():
    shape = ModelShape(layers=3, experts=16, top_k=4, hidden=8, expert_bytes=1, shared_bytes=1, frozen_bytes=1)
    assert expert_counts(tier(experts=0.125), shape) == (6, 6)
    assert expert_counts(tier(experts=0.3), shape) == (14, 14)
    assert expert_counts(tier(experts=0.01), shape) == (3, 3)
    assert expert_counts(tier(experts=0.5, batch_experts=0.125), shape) == (24, 6)
    assert expert_counts(tier(experts=0.5, batch_experts=0.001), shape) == (24, 1)
    ten = ModelShape(layers=1, experts=10, top_k=1, hidden=8, expert_bytes=1, shared_bytes=1, frozen_bytes=1)
    assert expert_counts(tier(experts=0.3), ten) == (3, 3)


# ------------------------------------------------------------------------------------------------------- packing


def test_ten_tenths_fill_a_device():
    packing = Packing([node(1)])
    assert all(packing.place(spec(0.1)) for _ in range(10))
    assert packing.place(spec(0.0001)) is None


def test_a_fraction_of_a_gpu_never_spans_two():
    packing = Packing([node(8, gpus=2)])
    assert [packing.place(spec(0.1, 0.6)) is not None for _ in range(3)] == [True, True, False]
    assert packing.place(spec(0.1, 0.4)) is not None


def test_whole_gpus_are_free_ones():
    packing = Packing([node(8, gpus=3)])
    assert packing.place(spec(0.1, 0.1))
    assert packing.place(spec(0.1, 2))
    assert packing.place(spec(0.1, 1)) is None


@given(st.integers(0, 10_000))
def test_what_is_released_can_be_placed_again(seed: int):
    rng = random.Random(seed)
    packing = Packing([node(4, gpus=2, gib=8), node(2, name="n1", gib=4)])
    asks = [spec(rng.choice([0.1, 0.5, 1]), rng.choice([0, 0, 0.3, 1]), rng.choice([0, 1, 3])) for _ in range(20)]
    places = [place for asked in asks if (place := packing.place(asked))]
    rng.shuffle(places)
    for place in places:
        packing.release(place)
    assert packing.place(spec(4, 2, 8))
    assert packing.place(spec(2, 0, 4))


# --------------------------------------------------------------------------------------------------------- slots


def test_every_tier_has_a_slot_and_the_rest_go_where_the_work_is():
    slots = plan_slots(THREE, [node(8)], 6)
    assert Counter(sizes(slots)) == {0.1: 3, 0.2: 2, 0.4: 1}


def test_with_few_slots_the_large_ones_stay_and_serve_the_small_tiers():
    assert [(s.resources.num_cpus, set(s.tiers)) for s in plan_slots(THREE, [node(8)], 2)] == [
        (0.4, {"phone", "laptop", "server"}),
        (0.2, {"phone", "laptop"}),
    ]
    (only,) = plan_slots(THREE, [node(8)], 1)
    assert set(only.tiers) == {"phone", "laptop", "server"}


@pytest.mark.parametrize("cores", [1, 2, 3, 5, 64])
def test_auto_gives_each_slot_a_core_and_never_more_slots_than_clients(cores: int):
    slots = plan_slots(THREE, [node(cores, gib=64)], "auto")
    assert len(slots) == min(cores, 10)
    assert {"phone", "laptop", "server"} == {name for slot in slots for name in slot.tiers}


def test_auto_counts_the_cores_of_each_node_by_itself():
    slots = plan_slots(THREE, [node(1), node(3, name="n1")], "auto")
    assert Counter(slot.node for slot in slots) == {"n0": 1, "n1": 3}


def test_auto_fills_gpus():
    slots = plan_slots([demand("a", spec(0.25, 0.3), 20)], [node(8, gpus=2)], "auto")
    assert len(slots) == 6


def test_sizes_neither_of_which_covers_the_other_are_joined():
    demands = [demand("wide", spec(0.5, gib=1)), demand("tall", spec(0.1, gib=4))]
    (slot,) = plan_slots(demands, [node(8)], 1)
    assert slot.resources == spec(0.5, gib=4)


def test_labels_are_kept_apart():
    demands = [demand("a", spec(0.2, site="a")), demand("b", spec(0.1, site="b")), demand("c", spec(0.1))]
    nodes = [node(2, name="na", site="a"), node(2, name="nb", site="b"), node(2, name="nc")]
    for slot in plan_slots(demands, nodes, "auto"):
        assert ("a" in slot.tiers) <= (slot.node == "na")
        assert ("b" in slot.tiers) <= (slot.node == "nb")
    with pytest.raises(CapacityError, match="at least 2"):
        plan_slots(demands, nodes, 1)


def test_a_tier_without_its_label_or_size_is_refused_with_the_reason():
    with pytest.raises(CapacityError, match=r"tier b .*n0 has no label site=b"):
        plan_slots([demand("a", spec(0.1)), demand("b", spec(0.1, site="b"))], [node()], "auto")
    with pytest.raises(CapacityError, match=r"tier big .*4 CPU.*n0 has 2 CPU free of 2"):
        plan_slots([demand("big", spec(4)), demand("small", spec(0.1))], [node()], "auto")
    with pytest.raises(CapacityError, match=r"n0 has 0 GPU free of 0"):
        plan_slots([demand("gpu", spec(0.1, 0.5))], [node()], "auto")


def test_more_slots_than_fit_are_refused():
    with pytest.raises(CapacityError, match=r"asks for 9 .*only 5 fit"):
        plan_slots([demand("a", spec(0.4), 20)], [node(2)], 9)


def test_auto_shrinks_to_what_fits_beside_each_other():
    demands = [demand("small", spec(0.5, gib=2)), demand("large", spec(0.5, gib=3))]
    (slot,) = plan_slots(demands, [node(4, gib=4)], "auto")
    assert set(slot.tiers) == {"small", "large"}


@given(st.integers(0, 10_000))
def test_slots_fit_their_nodes_and_serve_every_tier(seed: int):
    rng = random.Random(seed)
    demands = [
        demand(f"t{i}", spec(rng.choice([0.1, 0.5, 1]), 0, rng.choice([0.5, 1, 2])), rng.randint(1, 9))
        for i in range(rng.randint(1, 4))
    ]
    nodes = [node(rng.randint(1, 4), name=f"n{i}", gib=4) for i in range(rng.randint(1, 3))]
    slots = plan_slots(demands, nodes, "auto")
    assert {one.tier for one in demands} == {name for slot in slots for name in slot.tiers}
    for one in nodes:
        here = [slot.resources for slot in slots if slot.node == one.node]
        assert sum(asked.num_cpus for asked in here) <= one.cpus + 1e-6
        assert sum(asked.memory_bytes for asked in here) <= one.memory_bytes
    for slot in slots:
        for one in demands:
            assert (one.tier in slot.tiers) == slot.resources.covers(one.resources)


# ------------------------------------------------------------------------------------------------------ dedicated


def test_every_dedicated_client_has_its_place():
    asked = [("big", spec(1.5)), ("small", spec(0.5)), ("big", spec(1.5)), ("small", spec(0.5))]
    slots = plan_dedicated(asked, [node(2), node(2, name="n1")])
    assert [slot.client for slot in slots] == [0, 1, 2, 3]
    assert {slots[0].node, slots[2].node} == {"n0", "n1"}


def test_dedicated_clients_that_do_not_fit_are_named():
    asked = [("phone", spec(0.3)), ("server", spec(1.0))] * 3
    with pytest.raises(CapacityError) as caught:
        plan_dedicated(asked, [node(3.2)])
    assert caught.value.exit_code == 5
    text = str(caught.value)
    assert "3 of 6 clients" in text
    assert "phone: clients 0, 2, 4" in text
    assert "0.3 CPU" in text
    assert "0.2 CPU free of 3.2" in text


def test_plan_actors_uses_gpus_where_any_node_has_them():
    experiment = Experiment.model_validate(
        {
            "name": "x",
            "clients": {"count": 4, "tiers": [{"name": "a", "share": 1, "experts": 0.5, "device": 0.5}]},
            "model": {"source": "m"},
            "data": {"source": "d"},
        }
    )
    slots = plan_actors(experiment, [node(4, gpus=1), node(4, name="n1")])
    assert {slot.node for slot in slots} == {"n0"}
    assert all(slot.resources.num_gpus == 0.5 for slot in slots)
    assert all(slot.resources.num_gpus == 0 for slot in plan_actors(experiment, [node(4)]))
    assert tier_demands(experiment.clients, False)[0].clients == 4
