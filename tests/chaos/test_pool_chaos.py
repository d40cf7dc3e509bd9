"""Processes that die, hang or dawdle: the round goes on, and what can be computed again is the same again."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
import ray
from tiny_worker import Log, TinyWorker, context, outcome, task, weights

from hfedmoe_ray.runtime.local import LocalExecutor
from hfedmoe_ray.runtime.pool import RayExecutor
from hfedmoe_ray.types import TaskResult

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.usefixtures("cluster")]
TASKS = [task(client) for client in range(6)]


def run(executor: RayExecutor, log: Log) -> list[TaskResult]:
    return list(executor.run(TASKS, log))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[str, bytes]]:
    local = LocalExecutor(context(tmp_path_factory.mktemp("local")), worker_factory=TinyWorker)
    local.publish(weights())
    return outcome(list(local.run(TASKS, Log())))


@pytest.fixture
def executor(tmp_path: Path, request: pytest.FixtureRequest):
    made = RayExecutor(context(tmp_path, **request.param), worker_factory=TinyWorker)
    made.publish(weights())
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A deadline holds for an actor's first task too."""
    monkeypatch.setattr("hfedmoe_ray.runtime.timeouts.FIRST_CALL_GRACE", 0.0)


SLOTS = {"runtime": {"slots": 2, "deadline_s": 60}}
SHORT = {"runtime": {"slots": 2, "deadline_s": 1.0}}


@pytest.mark.parametrize("executor", [SLOTS, {"actors": "dedicated"}], indirect=True, ids=["pooled", "dedicated"])
def test_a_killed_client_is_tried_again_with_the_same_result(
    executor: RayExecutor, undisturbed: dict[int, tuple[str, bytes]], tmp_path: Path
):
    (tmp_path / "run" / "kill-3").touch()
    log = Log()
    results = run(executor, log)
    assert outcome(results) == undisturbed
    assert {result.task.client: result.attempts for result in results} == {0: 1, 1: 1, 2: 1, 3: 2, 4: 1, 5: 1}
    assert [fields["client"] for fields in log.named("task_retried")] == [3]
    assert len(log.named("slot_lost")) == 1
    assert outcome(run(executor, Log())) == undisturbed
    assert all(ray.get(slot.ping(), timeout=60)["pid"] for slot in executor.slots), "a slot was not replaced"


@pytest.mark.parametrize("executor", [SLOTS], indirect=True)
def test_an_idle_actor_that_dies_is_noticed_and_replaced(
    executor: RayExecutor, undisturbed: dict[int, tuple[str, bytes]]
):
    run(executor, Log())
    for slot in executor.slots:
        os.kill(ray.get(slot.ping(), timeout=60)["pid"], signal.SIGKILL)
    assert outcome(run(executor, Log())) == undisturbed


@pytest.mark.parametrize("executor", [{"runtime": {"slots": 2, "retries": 0}}], indirect=True)
def test_a_client_whose_retries_are_spent_fails(executor: RayExecutor, tmp_path: Path):
    (tmp_path / "run" / "kill-3").touch()
    results = {result.task.client: result for result in run(executor, Log())}
    assert results[3].status == "failed"
    assert "process died 1 time" in results[3].reason
    assert all(result.status == "ok" for client, result in results.items() if client != 3)


@pytest.mark.parametrize("executor", [SHORT], indirect=True)
def test_a_straggler_is_late_and_its_slot_lives_on(executor: RayExecutor, tmp_path: Path):
    (tmp_path / "run" / "slow-4").touch()
    log = Log()
    results = {result.task.client: result for result in run(executor, log)}
    assert results[4].status == "late"
    assert "deadline_s (1 s)" in results[4].reason
    assert all(result.status == "ok" for client, result in results.items() if client != 4)
    (tmp_path / "run" / "slow-4").unlink()
    assert all(result.status == "ok" for result in run(executor, log))
    assert not log.named("slot_lost"), "it stopped when asked; killing it was not necessary"


@pytest.mark.parametrize("executor", [SHORT], indirect=True)
def test_a_client_deaf_to_the_deadline_is_killed(
    executor: RayExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("hfedmoe_ray.runtime.timeouts.STOP_GRACE", 0.5)
    hang = tmp_path / "run" / "hang-4"
    hang.touch()
    log = Log()
    results = {result.task.client: result.status for result in run(executor, log)}
    assert results == {0: "ok", 1: "ok", 2: "ok", 3: "ok", 4: "late", 5: "ok"}
    hang.unlink()
    assert all(result.status == "ok" for result in run(executor, log))
    noticed_by = time.monotonic() + 60
    while not log.named("slot_lost") and time.monotonic() < noticed_by:
        list(executor.run([task(4)], log))  # the slot is replaced when the loop turns after its grace has ended
    assert [fields["reason"] for fields in log.named("slot_lost")] == ["did not stop within 0.5 s"]


@pytest.mark.parametrize("executor", [{"runtime": {"slots": 1, "deadline_s": 1.0}}], indirect=True)
def test_the_first_task_of_an_actor_may_take_longer(
    executor: RayExecutor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("hfedmoe_ray.runtime.timeouts.FIRST_CALL_GRACE", 2.0)
    (tmp_path / "run" / "slow-4").touch()
    log = Log()
    for seconds in (3.0, 1.0):
        (late,) = executor.run([task(4)], log)
        assert late.status == "late"
        assert seconds <= log.named("task_finished")[-1]["seconds"] < seconds + 0.9


@pytest.mark.parametrize("executor", [SHORT], indirect=True)
def test_closing_never_waits_for_a_hanging_client(executor: RayExecutor, tmp_path: Path):
    (tmp_path / "run" / "hang-4").touch()
    run(executor, log := Log())
    pids = [int(str(fields["pid"])) for fields in log.named("slot_ready")]
    started = time.monotonic()
    executor.close()
    assert time.monotonic() - started < 2
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=20)
    assert not alive
