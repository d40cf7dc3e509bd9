"""The local executor keeps the contract of every executor, in one process and in client order."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_worker import Log, TinyWorker, context, task, weights

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.federation.reporting import published_bytes
from hfedmoe_ray.runtime.local import LocalExecutor, task_weights
from hfedmoe_ray.types import AbsentMode, ClientTask, ExpertKey, PersonalWeights, TaskWeights


@pytest.fixture
def executor(tmp_path: Path) -> LocalExecutor:
    made = LocalExecutor(context(tmp_path, runtime={"deadline_s": 0.2}), worker_factory=TinyWorker)
    made.publish(weights())
    return made


def test_tasks_run_in_client_order_and_are_told(executor: LocalExecutor):
    log = Log()
    results = list(executor.run([task(client) for client in (3, 0, 2)], log))
    assert [result.task.client for result in results] == [0, 2, 3]
    assert [event for event, _ in log.events] == ["task_started", "task_finished"] * 3
    assert all(result.status == "ok" and result.payload is not None for result in results)


def test_a_failure_is_that_clients_alone(executor: LocalExecutor, tmp_path: Path):
    (tmp_path / "run" / "fail-1").touch()
    log = Log()
    results = list(executor.run([task(client) for client in range(3)], log))
    assert [result.status for result in results] == ["ok", "failed", "ok"]
    assert results[1].reason == "ValueError: client 1 has no examples"
    assert "in _misbehave" in str(log.named("task_error")[0]["traceback"])


def test_a_straggler_is_late(executor: LocalExecutor, tmp_path: Path):
    (tmp_path / "run" / "slow-1").touch()
    results = list(executor.run([task(client) for client in range(3)], Log()))
    assert [result.status for result in results] == ["ok", "late", "ok"]
    assert "deadline_s (0.2 s)" in results[1].reason


def test_what_a_task_reads_cannot_be_written(tmp_path: Path):
    class Writer:
        def __init__(self, _context: RunContext) -> None:
            pass

        def execute(
            self, _task: ClientTask, weights: TaskWeights, _should_stop: Callable[[], bool]
        ) -> tuple[bytes, bytes, bytes]:
            weights.experts[ExpertKey(0, 0)]["up"][0] = 1
            return b"", b"", b""

    executor = LocalExecutor(context(tmp_path), worker_factory=Writer)
    published = weights()
    before = {name: array.copy() for name, array in published.experts[ExpertKey(0, 0)].items()}
    executor.publish(published)
    (result,) = executor.run([task(0)], Log())
    assert result.status == "failed"
    assert "read-only" in result.reason
    assert all(np.array_equal(before[n], a) for n, a in published.experts[ExpertKey(0, 0)].items())


def test_only_present_experts_and_private_weights_are_given(tmp_path: Path):
    seen: list[TaskWeights] = []

    class Recorder(TinyWorker):
        def execute(
            self, task: ClientTask, weights: TaskWeights, should_stop: Callable[[], bool]
        ) -> tuple[bytes, bytes, bytes]:
            seen.append(weights)
            return super().execute(task, weights, should_stop)

    own = PersonalWeights(shared={"head": np.ones(2)}, experts={ExpertKey(0, 0): {"up": np.ones(2)}})
    executor = LocalExecutor(context(tmp_path), worker_factory=Recorder)
    executor.publish(weights(0, personal={1: own}))
    list(executor.run([task(1, present=1), task(1, present=1, personal=1)], Log()))
    public, private = seen
    assert set(public.experts) == set(private.experts) == {ExpertKey(0, 0), ExpertKey(1, 0)}
    assert set(public.shared) == {"router"}
    assert set(private.shared) == {"router", "head"}
    assert np.array_equal(private.experts[ExpertKey(0, 0)]["up"], np.ones(2))


@pytest.mark.parametrize("absent", ["mean", "drop", "reroute"])
@pytest.mark.parametrize("present", [1, 4])
def test_bytes_down_are_those_of_the_arrays_a_task_reads(absent: AbsentMode, present: int):
    """Private weights are at home already."""
    own = PersonalWeights(shared={"head": np.ones(2)}, experts={ExpertKey(0, 0): {"up": np.ones(2)}})
    published = replace(weights(0, personal={1: own}), means=np.zeros((2, 4, 8)))
    for personal in (None, 1):
        made = task(1, present=present, personal=personal)
        made = replace(made, plan=replace(made.plan, absent=absent))
        read = task_weights(published, made)
        arrays = [*read.shared.values(), *(a for named in read.experts.values() for a in named.values())]
        arrays += [] if read.means is None else [read.means]
        at_home = 0 if personal is None else 2 * 8 + 2 * 8
        assert published_bytes(published, made) == sum(array.nbytes for array in arrays) - at_home
        assert (read.means is not None) == (absent == "mean" and present < 4)


def test_versions_older_than_the_last_are_dropped(executor: LocalExecutor):
    for version in (1, 2):
        executor.publish(weights(version))
    (result,) = executor.run([task(0, 1)], Log())
    assert result.status == "ok"
    with pytest.raises(KeyError):
        list(executor.run([task(0, 0)], Log()))


def test_a_worker_is_made_once_and_only_when_needed(tmp_path: Path):
    made = threading.Semaphore(0)

    def factory(run: RunContext) -> TinyWorker:
        made.release()
        return TinyWorker(run)

    executor = LocalExecutor(context(tmp_path), worker_factory=factory)
    executor.publish(weights())
    assert not made.acquire(blocking=False)
    for _ in range(2):
        list(executor.run([task(0)], Log()))
    assert made.acquire(blocking=False)
    assert not made.acquire(blocking=False)
