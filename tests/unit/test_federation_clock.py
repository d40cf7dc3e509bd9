"""The simulated clock: right in every direction, the same however a run was made, absent where no device is named."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_federation import HFEDMOE, PHONE, Recorder, experiment, on_devices, run

from hfedmoe_ray.federation.clock import Clock, forward_flops, training_flops
from hfedmoe_ray.federation.rounds import Federation
from hfedmoe_ray.runtime.local import LocalExecutor
from hfedmoe_ray.strategies.scores import uniform_plan
from hfedmoe_ray.studies.work import step_costs
from hfedmoe_ray.types import ClientTask, ExpertPlan, ModelShape, Role

SHAPE = ModelShape(
    layers=2,
    experts=4,
    top_k=2,
    hidden=8,
    expert_bytes=4 * 100,
    shared_bytes=4 * 50,
    frozen_bytes=4 * 1000,
    table_bytes=4 * 600,
)


def holding(row: str, **fields: Any) -> ExpertPlan:
    """A plan whose layers are like "TTF-": trained, trained, frozen, absent."""
    roles = {"T": Role.TRAIN, "F": Role.FROZEN, "-": Role.ABSENT}
    return ExpertPlan(roles=(tuple(roles[one] for one in row),) * 2, **fields)


@pytest.mark.parametrize(
    ("plan", "forward", "training"),
    [
        # D = 450, S = 50. Everything held: R = 2 layers x 2 experts x 100.
        (holding("TTTT"), 2 * (450 + 400), 2 * (450 + 400 + 50 + 400 + 50 + 400)),
        # Half of what a token is routed to is absent, and costs nothing ...
        (holding("TT--"), 2 * (450 + 200), 2 * (450 + 200 + 50 + 200 + 50 + 200)),
        # ... unless it goes to those that are there.
        (holding("TT--", absent="reroute"), 2 * (450 + 400), 2 * (450 + 400 + 50 + 400 + 50 + 400)),
        (holding("TF--"), 2 * (450 + 200), 2 * (450 + 200 + 50 + 200 + 50 + 100)),
        (holding("TTTT", batch_budget=2), 2 * (450 + 400), 2 * (450 + 400 + 50 + 400 + 50 + 100)),
        (holding("TTTT", top_k=1), 2 * (450 + 200), 2 * (450 + 200 + 50 + 200 + 50 + 200)),
    ],
)
def test_the_flops_of_a_token_by_hand(plan: ExpertPlan, forward: float, training: float):
    assert forward_flops(SHAPE, plan) == pytest.approx(forward)
    assert training_flops(SHAPE, plan) == pytest.approx(training)


def test_flops_are_about_those_that_torch_counts(sources: Path, tmp_path: Path):
    """Texts fill the room they have, so that padding, which experts do not compute, makes no difference."""
    data = experiment(sources).data.model_dump() | {"max_length": 4}
    made = experiment(sources, "mixtral", strategy={"name": "fedavg"}, rounds=1, data=data)
    context, _, _ = run(made, tmp_path / "run")
    federation = Federation(context, LocalExecutor(context), Recorder(), resume=True)
    plan = uniform_plan(federation.strategy.shape, Role.TRAIN)
    counted = [cost.flops for cost in step_costs(federation).values()]
    batch = made.local.batch_size * made.data.max_length
    assert counted == pytest.approx([batch * training_flops(context.model.shape, plan)] * 4, rel=0.2)


@pytest.mark.parametrize("kind", ["train", "profile"])
def test_a_better_device_is_never_slower_and_more_work_never_quicker(sources: Path, kind: Any):
    task = ClientTask(kind=kind, round=1, client=0, seed=0, plan=holding("TT--"), version=0)

    def seconds(plan: ExpertPlan = task.plan, down: int = 10_000, up: int = 10_000, **device: float) -> float:
        made = on_devices(sources, PHONE | device)
        clock = Clock(made, SHAPE, [made.clients.tiers[0]])
        taken = clock.seconds(replace(task, plan=plan), samples=100, bytes_down=down, bytes_up=up)
        assert taken is not None
        return taken

    for key in ("tflops", "memory_gbps", "down_mbps", "up_mbps"):
        assert seconds(**{key: PHONE[key] / 1e4}) > seconds() >= seconds(**{key: PHONE[key] * 1e4})
    assert seconds(down=20_000) - seconds() == pytest.approx(10_000 * 8 / 10e6)
    assert seconds(up=20_000) - seconds() == pytest.approx(10_000 * 8 / 5e6)
    assert seconds(holding("TTTT")) > seconds()


def test_a_round_takes_what_its_slowest_client_takes_and_a_resumed_run_tells_the_same(sources: Path, tmp_path: Path):
    made = on_devices(sources, rounds=3, evaluate={"target": 0.0, "every": 2})
    _, summary, whole = run(made, tmp_path / "whole")
    for report in whole.rounds:
        assert all(record.simulated_seconds for record in report.clients)
        assert report.simulated_seconds == max(record.simulated_seconds for record in report.clients)
    slowest = [max(r.clients, key=lambda record: record.simulated_seconds or 0.0).tier for r in whole.rounds]
    assert slowest == ["phone"] * 4
    each = [report.simulated_seconds for report in whole.rounds]
    assert summary["simulated_seconds"] == sum(each)
    assert summary["simulated_seconds_to_target"] == each[0]
    run(made, tmp_path / "cut", stop_after=1)
    _, resumed, rest = run(made, tmp_path / "cut", resume=True)
    assert resumed["simulated_seconds"] == summary["simulated_seconds"]
    assert [report.simulated_seconds for report in rest.rounds] == each[2:]


def test_who_dropped_out_is_not_waited_for(sources: Path, tmp_path: Path):
    made = on_devices(sources, rounds=2)
    failing = made.clients.model_copy(update={"failure_rate": 0.5})
    _, _, recorder = run(made.model_copy(update={"clients": failing}), tmp_path / "run")
    assert any(record.status == "dropped" for report in recorder.rounds for record in report.clients)
    for report in recorder.rounds:
        delivered = [record.simulated_seconds for record in report.clients if record.status == "ok"]
        assert report.simulated_seconds == max(delivered, default=0.0)


def test_without_devices_there_is_no_simulated_time(sources: Path, tmp_path: Path):
    _, summary, recorder = run(experiment(sources, rounds=1), tmp_path / "run")
    assert summary["simulated_seconds"] is summary["simulated_seconds_to_target"] is None
    assert {record.simulated_seconds for report in recorder.rounds for record in report.clients} == {None}
    assert {report.simulated_seconds for report in recorder.rounds} == {None}


def test_a_device_for_some_tiers_only_is_refused(sources: Path):
    clients = on_devices(sources).clients.model_dump()
    clients["tiers"][1]["simulated"] = None
    with pytest.raises(ValueError, match="no simulated device is given for server"):
        experiment(sources, clients=clients, strategy=HFEDMOE)
