"""The executor on real actors: results never depend on the mode, the number of slots, or where an actor lives."""

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import ray
from tiny_worker import STATE_REPEATS, BrokenWorker, ForgingWorker, Log, TinyWorker, context, outcome, task, weights

from hfedmoe_ray.errors import CapacityError, TrainingError
from hfedmoe_ray.runtime.local import LocalExecutor
from hfedmoe_ray.runtime.pool import RayExecutor
from hfedmoe_ray.runtime.slot import State, plain
from hfedmoe_ray.types import ExpertKey, PersonalWeights

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
TASKS = [task(client, present=1 + client % 3) for client in range(6)]


@pytest.fixture
def executor(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RayExecutor]:
    """One of its own kind, which the tests at the beginning ask for."""
    made = RayExecutor(context(tmp_path, **request.param), worker_factory=TinyWorker)
    made.publish(weights())
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, cluster: None) -> Iterator[RayExecutor]:
    del cluster
    made = RayExecutor(context(tmp_path_factory.mktemp("pool"), runtime={"slots": 2}), worker_factory=TinyWorker)
    yield made
    made.close()


@pytest.fixture
def two_slots(shared: RayExecutor) -> RayExecutor:
    """The same for all tests from here on, with version 0 of the weights, whatever a test has done to it."""
    shared.publish(weights(), keep=frozenset({0}))
    return shared


@pytest.fixture
def run_dir(two_slots: RayExecutor) -> Iterator[Path]:
    """Where files make clients misbehave, until the test has ended."""
    yield two_slots._context.run_dir
    for file in two_slots._context.run_dir.iterdir():
        file.unlink()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[str, bytes]]:
    local = LocalExecutor(context(tmp_path_factory.mktemp("local")), worker_factory=TinyWorker)
    local.publish(weights())
    return outcome(list(local.run(TASKS, Log())))


@pytest.mark.parametrize(
    "executor",
    [{"runtime": {"slots": 1}}, {"runtime": {"slots": 4}}],
    indirect=True,
    ids=["one slot", "four slots"],
)
def test_same_results_in_however_many_slots(executor: RayExecutor, expected: dict[int, tuple[str, bytes]]):
    log = Log()
    assert outcome(list(executor.run(TASKS, log))) == expected
    assert all(status == "ok" for status, _ in expected.values())
    assert {fields["client"] for fields in log.named("task_finished")} == set(range(6))


@pytest.mark.parametrize("executor", [{"actors": "dedicated"}], indirect=True)
def test_a_dedicated_client_holds_what_its_tier_asks_for_and_gives_the_same_results(
    executor: RayExecutor, expected: dict[int, tuple[str, bytes]]
):
    log = Log()
    assert outcome(list(executor.run(TASKS, log))) == expected
    assert {fields["client"] for fields in log.named("task_finished")} == set(range(6))
    for slot in executor.slots:
        assigned = ray.get(slot.ping(), timeout=30)["resources"]
        tier = {"phone": 0.1, "server": 0.2}[slot.spec.tiers[0]]
        assert assigned["CPU"] == pytest.approx(tier)
        assert assigned["memory"] == int(tier * 2**30)
    names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    assert {f"tiny-client-{client:03d}" for client in range(6)} <= names
    assert ray.available_resources()["CPU"] == pytest.approx(ray.cluster_resources()["CPU"] - 3 * 0.1 - 3 * 0.2)


def test_a_slot_reserves_its_tier_and_serves_smaller_ones(two_slots: RayExecutor):
    list(two_slots.run(TASKS, Log()))
    large, small = two_slots.slots
    assert set(large.spec.tiers) == {"phone", "server"}
    assert set(small.spec.tiers) == {"phone"}
    for slot, cpus in ((large, 0.2), (small, 0.1)):
        assert ray.get(slot.ping(), timeout=30)["resources"]["CPU"] == pytest.approx(cpus)


def test_clients_that_do_not_fit_are_refused_before_any_actor_is_made(tmp_path: Path):
    def free() -> dict[str, float]:
        # What earlier tests left in the object store is freed some time later.
        return {name: amount for name, amount in ray.available_resources().items() if name != "object_store_memory"}

    before = free()
    tiers = [{"name": "huge", "share": 1, "experts": 1, "device": 1, "memory_gib": 0.1}]
    with pytest.raises(CapacityError, match=r"huge: clients? .*1 CPU"):
        RayExecutor(context(tmp_path, actors="dedicated", clients={"count": 99, "tiers": tiers}))
    assert free() == before


def test_arrays_arrive_read_only_and_one_thread_computes(two_slots: RayExecutor):
    for result in two_slots.run(TASKS, Log()):
        assert result.metrics is not None
        assert result.metrics.tokens == 0, "a fetched array was writable"
        assert result.metrics.loss == 1.0, "started without `environment.ENVIRONMENT`"


def test_only_present_experts_are_fetched(two_slots: RayExecutor):
    for result in two_slots.run(TASKS, Log()):
        assert result.metrics is not None
        assert result.metrics.samples == len(result.task.plan.present) == 2 * (1 + result.task.client % 3)


def test_a_task_reads_the_version_it_names(two_slots: RayExecutor, expected: dict[int, tuple[str, bytes]]):
    two_slots.publish(weights(1))
    old, new = (outcome(list(two_slots.run([task(0, version)], Log())))[0] for version in (0, 1))
    assert old != new
    assert old == outcome(list(two_slots.run([task(0)], Log())))[0]
    assert outcome(list(two_slots.run(TASKS, Log()))) == expected


def test_private_weights_are_laid_over_the_global_ones(two_slots: RayExecutor, tmp_path: Path):
    own = PersonalWeights(shared={"router": np.ones((4, 8))}, experts={ExpertKey(1, 0): {"up": np.ones((8, 4))}})
    published = weights(2, personal={3: own})
    local = LocalExecutor(context(tmp_path), worker_factory=TinyWorker)
    tasks = [task(2, 2), task(3, 2), task(3, 2, personal=3, round=2), task(4, 2, personal=4)]
    runs = []
    for one in (two_slots, local):
        one.publish(published)
        results = one.run(tasks, Log())
        runs.append({(r.task.client, r.task.round): r.payload() for r in results if r.payload})
    assert runs[0] == runs[1]
    assert len(set(runs[0].values())) == 4
    plain = outcome(list(two_slots.run([task(3, 2, round=2)], Log())))[3]
    assert plain[1] != runs[0][3, 2]


def test_a_clients_state_goes_to_whichever_actor_serves_it_next(two_slots: RayExecutor, tmp_path: Path):
    """Its actor killed in between, and from a checkpoint."""
    local = LocalExecutor(context(tmp_path), worker_factory=TinyWorker)
    local.publish(weights())
    histories = []
    for one in (local, two_slots):
        history, states = [], {}
        for round in range(3):
            results = one.run([task(client, round=round, state=states.get(client)) for client in range(4)], Log())
            for result in results:
                assert result.state is not None
                assert len(result.state()) == 32 * STATE_REPEATS
                states[result.task.client] = result.state if round < 1 else partial(bytes, result.state())
            history.append({client: fetch() for client, fetch in states.items()})
            if one is two_slots and round == 0:
                for slot in two_slots.slots:
                    os.kill(ray.get(slot.ping(), timeout=60)["pid"], signal.SIGKILL)
        histories.append(history)
    assert histories[0] == histories[1]
    assert len({state for history in histories[0] for state in history.values()}) == 3 * 4


def test_an_exception_in_client_code_fails_that_client_alone(two_slots: RayExecutor, run_dir: Path):
    (run_dir / "fail-2").touch()
    log = Log()
    results = {result.task.client: result for result in two_slots.run(TASKS, log)}
    assert [client for client, result in results.items() if result.status != "ok"] == [2]
    assert results[2].reason == "ValueError: client 2 has no examples"
    (error,) = log.named("task_error")
    assert error["client"] == 2
    assert "in _misbehave" in str(error["traceback"])
    assert not log.named("slot_lost")


def test_a_payload_is_handed_out_once(two_slots: RayExecutor):
    (result,) = two_slots.run([task(0)], Log())
    assert result.payload is not None
    assert len(result.payload()) == 200_032
    with pytest.raises(RuntimeError, match="fetched before"):
        result.payload()


def test_closing_the_iterator_stops_what_runs(two_slots: RayExecutor, run_dir: Path):
    # The longest task, so the first to be started: whichever slot is there first, the other one's results go on.
    (run_dir / "slow-2").touch()
    results = two_slots.run(TASKS, log := Log())
    assert next(results).task.client != 2
    assert {fields["client"] for fields in log.named("task_started")} >= {2}
    results.close()
    (after,) = two_slots.run([task(0)], Log())
    assert after.status == "ok"
    assert {slot.state for slot in two_slots.slots} <= {State.IDLE, State.STOPPING}


def test_a_model_that_cannot_be_loaded_ends_the_run_with_its_error(tmp_path: Path):
    made = RayExecutor(context(tmp_path), worker_factory=BrokenWorker)
    made.publish(weights())
    with pytest.raises(TrainingError, match=r"cannot load .*ValueError: .* is not a model"):
        list(made.run(TASKS, Log()))
    made.close()


def test_what_crosses_from_a_client_is_bytes_and_anything_else_is_rejected(tmp_path: Path):
    executor = RayExecutor(context(tmp_path, runtime={"slots": 2}), worker_factory=ForgingWorker)
    try:
        executor.publish(weights())
        for round in (0, 1):
            told = {r.task.client: r for r in executor.run([task(client, round=round) for client in range(3)], Log())}
            assert [told[client].status for client in range(3)] == ["ok", "rejected", "ok"]
            assert told[1].reason == "it returned something else than bytes and text"
            assert told[1].payload is None
            assert told[0].payload_bytes == len(told[0].payload())
        honest = task(0)
        slot = next(slot for slot in executor.slots if slot.state is State.IDLE)
        returned = ray.get(slot._actor.execute.remote(honest, executor._store.refs(honest)), timeout=60)
        assert plain(*returned)
    finally:
        executor.close()
