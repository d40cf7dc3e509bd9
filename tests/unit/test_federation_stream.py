"""Runs that overlap on one executor: every task has its own result and its own listener, whenever it is asked for."""

from pathlib import Path

import pytest
from tiny_worker import Log, TinyWorker, context, outcome, task, weights

from hfedmoe_ray.federation.stream import Stream
from hfedmoe_ray.runtime.local import LocalExecutor


@pytest.fixture
def executor(tmp_path: Path) -> LocalExecutor:
    made = LocalExecutor(context(tmp_path, backend="local"), worker_factory=TinyWorker)
    made.publish(weights())
    return made


def test_results_are_taken_in_any_order_while_others_run(executor: LocalExecutor):
    tasks = [task(client) for client in range(6)]
    expected = outcome(list(executor.run(tasks, Log())))
    stream, log, other = Stream(executor, Log()), Log(), Log()
    stream.submit(tasks[:3], log)
    assert outcome([stream.result(tasks[2])]) == {2: expected[2]}
    assert outcome(list(stream.run(tasks[4:], other))) == {client: expected[client] for client in (4, 5)}
    assert sorted(fields["client"] for fields in other.named("task_finished")) == [4, 5]
    stream.submit(tasks[3:4], log)
    assert outcome([stream.result(one) for one in (tasks[3], tasks[0], tasks[1])]) == {
        client: expected[client] for client in (0, 1, 3)
    }
    assert sorted(fields["client"] for fields in log.named("task_finished")) == [0, 1, 2, 3]


def test_a_run_may_be_given_further_tasks(executor: LocalExecutor):
    """By the executor itself, and by a stream over it."""
    tasks = [task(client) for client in range(4)]
    expected = outcome(list(executor.run(tasks, Log())))
    for runs in (executor, Stream(executor, Log())):
        left = [[], [tasks[3]], [tasks[1], tasks[2]]]
        assert outcome(list(runs.run(tasks[:1], Log(), lambda more=left: more.pop() if more else []))) == expected


def test_versions_that_tasks_start_from_are_kept_until_they_are_done(executor: LocalExecutor):
    stream, log = Stream(executor, Log()), Log()
    waiting = task(0, 0)
    expected = outcome(list(executor.run([waiting], log)))
    stream.submit([waiting], log)
    for version in (1, 2, 3):
        stream.publish(weights(version))
    assert outcome([stream.result(waiting)]) == expected
    stream.publish(weights(4))
    with pytest.raises(KeyError):
        list(executor.run([waiting], log))


def test_what_is_closed_is_forgotten_and_the_executor_goes_on(executor: LocalExecutor):
    stream = Stream(executor, Log())
    stream.submit([task(0), task(1)], Log())
    stream.close()
    assert sorted(outcome(list(stream.run([task(2)], Log())))) == [2]


def test_closing_a_run_stops_its_own_tasks_and_no_others(executor: LocalExecutor):
    beside, own = [task(0), task(4)], [task(1), task(2), task(3)]
    expected = outcome(list(executor.run([*beside, *own], Log())))
    stream, log, other = Stream(executor, Log()), Log(), Log()
    stream.submit(beside, log)
    running = stream.run(own, other)
    assert next(running).task is own[0]
    running.close()
    assert outcome([stream.result(one) for one in beside]) == {client: expected[client] for client in (0, 4)}
    assert outcome(list(stream.run([own[2]], other))) == {3: expected[3]}
    assert [fields["client"] for fields in other.named("task_started")] == [1, 3]
