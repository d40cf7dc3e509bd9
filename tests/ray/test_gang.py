"""Clients of several devices on Ray: a rank on each, which live and die together."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from gang_worker import MortalWorker
from tiny_federation import experiment, final_weights, run
from tiny_worker import Log, outcome

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.moe.prepare import initial_weights
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.runtime.pool import RayExecutor
from hfedmoe_ray.types import ClientTask, ExpertPlan, Role, TaskResult

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
PHONE = {"name": "phone", "share": 0.5, "experts": 0.25, "device": 0.1, "memory_gib": 0.5}
SERVER = {"name": "server", "share": 0.5, "experts": 0.5, "batch_experts": 0.34, "memory_gib": 0.5}
GANG = SERVER | {"device": 2, "num_cpus": 0.4}
GANG_CLIENT = 1
"""One of the clients of the tier."""
LOCAL = {"steps": 3, "batch_size": 5, "learning_rate": 1e-3, "profile_examples": 8}
PLAN = ExpertPlan(roles=((Role.TRAIN,) * 4 + (Role.ABSENT,) * 2,) * 2, absent="drop", batch_budget=4)


def made(sources: Path, server: dict[str, Any], **changes: Any) -> Any:
    clients = {"count": 4, "tiers": [PHONE, server]}
    return experiment(sources, "mixtral", backend="ray", clients=clients, local=LOCAL, **changes)


def groups() -> list[str]:
    """States of the placement groups that are left."""
    return [group["state"] for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]


@pytest.fixture(scope="module")
def prepared(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> RunContext:
    context = prepare_run(made(sources, GANG, runtime={"slots": 1}), tmp_path_factory.mktemp("gang") / "run")
    context.run_dir.mkdir(exist_ok=True)
    return context


@pytest.fixture(scope="module")
def executor(prepared: RunContext, cluster: None) -> Iterator[RayExecutor]:
    """One slot, which is a gang of two."""
    del cluster
    pool = RayExecutor(prepared, worker_factory=MortalWorker)
    pool.publish(initial_weights(prepared.model, "experts", None))
    yield pool
    pool.close()


def tasks(executor: RayExecutor) -> list[ClientTask]:
    """One for each client, phones' included."""
    assert [slot.spec.resources.ranks for slot in executor.slots] == [2]
    assert executor._recipe.tiers[GANG_CLIENT] == "server"
    return [ClientTask(kind="train", round=1, client=c, seed=0, plan=PLAN, version=0, weight=4 - c) for c in range(4)]


@pytest.fixture(scope="module")
def undisturbed(executor: RayExecutor) -> dict[int, tuple[str, bytes]]:
    return outcome(list(executor.run(tasks(executor), Log())))


def attempts(results: list[TaskResult]) -> dict[int, int]:
    return {result.task.client: result.attempts for result in results}


def test_a_gang_is_one_process_a_device_and_gives_the_same_bits_again(
    executor: RayExecutor, undisturbed: dict[int, tuple[str, bytes]]
):
    assert {status for status, _ in undisturbed.values()} == {"ok"}
    assert outcome(list(executor.run(tasks(executor), Log()))) == undisturbed
    (slot,) = executor.slots
    processes = slot.processes
    found = ray.get([one.ping.remote() for one in (processes.leader, *processes.followers)], timeout=60)
    assert len({one["pid"] for one in found}) == 2
    assert all(one["resources"]["CPU"] == pytest.approx(0.2) for one in found)
    assert groups() == ["CREATED"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_in_mid_task_costs_an_attempt_and_no_bit(
    executor: RayExecutor, prepared: RunContext, undisturbed: dict[int, tuple[str, bytes]], rank: int
):
    (prepared.run_dir / f"kill-{rank}").touch()
    results = list(executor.run(tasks(executor), log := Log()))
    assert outcome(results) == undisturbed
    assert sorted(attempts(results).values()) == [1, 1, 1, 2]
    assert len(log.named("slot_lost")) == 1
    assert re.search("[Dd]ied|is lost", str(log.named("slot_lost")[0]["reason"]))
    assert groups() == ["CREATED"]


def test_a_follower_that_dies_idle_is_noticed_before_the_next_task(
    executor: RayExecutor, undisturbed: dict[int, tuple[str, bytes]]
):
    (slot,) = executor.slots
    pid = ray.get(slot.processes.followers[0].ping.remote(), timeout=60)["pid"]
    os.kill(pid, signal.SIGKILL)
    ray.wait([slot.watched], timeout=60)
    results = list(executor.run(tasks(executor), Log()))
    assert outcome(results) == undisturbed
    assert set(attempts(results).values()) == {1}


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_a_rank_fails_that_client_alone_and_says_why(
    executor: RayExecutor, prepared: RunContext, undisturbed: dict[int, tuple[str, bytes]], rank: int
):
    (prepared.run_dir / f"fail-{rank}").touch()
    results = list(executor.run(tasks(executor), log := Log()))
    failed = [result for result in results if result.status != "ok"]
    assert [result.reason for result in failed] == [f"ValueError: rank {rank} cannot go on"]
    assert "in _misbehave" in str(log.named("task_error")[0]["traceback"])
    assert outcome(list(executor.run(tasks(executor), Log()))) == undisturbed


@pytest.fixture
def hasty(executor: RayExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deadline of a second, and five to stop: slow ranks need two."""
    monkeypatch.setattr(executor, "_runtime", executor._runtime.model_copy(update={"deadline_s": 1.0}))
    monkeypatch.setattr("hfedmoe_ray.runtime.timeouts.FIRST_CALL_GRACE", 0.0)
    monkeypatch.setattr("hfedmoe_ray.runtime.timeouts.STOP_GRACE", 5.0)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(("what", "lost"), [("slow-0", []), ("hang-1", ["did not stop within 5 s"])])
def test_a_late_gang_stops_as_one_or_is_replaced(
    executor: RayExecutor, prepared: RunContext, undisturbed: dict[int, tuple[str, bytes]], what: str, lost: list[str]
):
    (prepared.run_dir / what).touch()
    (result,) = executor.run([one for one in tasks(executor) if one.client == GANG_CLIENT], Log())
    assert result.status == "late"
    executor._runtime = prepared.experiment.runtime
    assert outcome(list(executor.run(tasks(executor), log := Log()))) == undisturbed
    assert [one["reason"] for one in log.named("slot_lost")] == lost


def test_a_whole_run_of_gangs_is_that_of_single_clients_within_the_rounding_of_sums(sources: Path, tmp_path: Path):
    before = groups()
    ranked, _, told = run(made(sources, GANG, runtime={"slots": 1}), tmp_path / "gang", where=RayExecutor)
    single, _, expected = run(made(sources, SERVER), tmp_path / "single")
    assert groups() == before
    for report, other in zip(told.rounds, expected.rounds, strict=True):
        assert [one.status for one in report.clients] == [one.status for one in other.clients]
    one, other = final_weights(ranked), final_weights(single)
    for key, named in other.experts.items():
        for name, array in named.items():
            assert float(np.quantile(np.abs(one.experts[key][name] - array), 0.95)) <= 5e-6
