"""A node that is lost takes its actors and unfinished work; both go on elsewhere, with the same results."""

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from tiny_worker import TIERS, Log, TinyWorker, context, outcome, task, weights

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.errors import CapacityError, ClusterError
from hfedmoe_ray.runtime.cluster import capacity, connected
from hfedmoe_ray.runtime.local import LocalExecutor
from hfedmoe_ray.runtime.pool import RayExecutor
from hfedmoe_ray.types import ClientTask, TaskResult

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
TASKS = [task(client) for client in range(6)]
ROUNDS_UNTIL_NOTICED = 50


QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}


@pytest.fixture(scope="module")
def nodes(request: pytest.FixtureRequest, ray_directory: str) -> Iterator[Cluster]:
    """A head without CPUs that notices lost nodes quickly, and three nodes with one CPU each."""
    request.getfixturevalue("workers_import_tests")
    made = Cluster()
    for number in range(4):
        size = {"num_cpus": min(number, 1), "object_store_memory": 2**27, "memory": 2**30}
        head = {} if number else {"_system_config": QUICK}
        made.add_node(**size, **head, labels={"site": f"n{number}"}, temp_dir=ray_directory)
    with connected(made.address):
        yield made
    made.shutdown()


def lose(cluster: Cluster, node_id: str) -> None:
    lost = next(node for node in cluster.worker_nodes if node.node_id == node_id)
    cluster.remove_node(lost, allow_graceful=False)


def continued(results: list[TaskResult]) -> list[ClientTask]:
    """The same tasks with the states their clients were left in."""
    return [replace(result.task, state=result.state) for result in results]


def undisturbed(made: RunContext) -> tuple[Any, Any]:
    """What the tasks give in one process, and what they give once more with the states their clients were left in."""
    local = LocalExecutor(made, worker_factory=TinyWorker)
    local.publish(weights())
    first = list(local.run(TASKS, Log()))
    return outcome(first), outcome(list(local.run(continued(first), Log())))


def test_work_of_a_lost_node_moves_to_another(nodes: Cluster, tmp_path: Path):
    made = context(tmp_path)
    first, expected = undisturbed(made)
    executor = RayExecutor(made, worker_factory=TinyWorker)
    executor.publish(weights())
    log = Log()
    try:
        assert {slot.spec.node for slot in executor.slots} == {node.node for node in capacity() if node.cpus}
        before = list(executor.run(TASKS, log))
        assert outcome(before) == first
        lost = executor.slots[0].spec.node
        lose(nodes, lost)
        # The other slots may finish a round before the loss is noticed; every round's results are the same.
        for _ in range(ROUNDS_UNTIL_NOTICED):
            assert outcome(list(executor.run(continued(before), log))) == expected
            if executor.slots[0].spec.node != lost:
                break
        assert {slot.spec.node for slot in executor.slots} == {slot.spec.node for slot in executor.slots[1:]}
    finally:
        executor.close()


def add(cluster: Cluster, ray_directory: str, site: str) -> str:
    size = {"num_cpus": 1, "object_store_memory": 2**27, "memory": 2**30}
    return str(cluster.add_node(**size, labels={"site": site}, temp_dir=ray_directory).node_id)


def test_a_node_that_joins_is_used_from_the_next_round_on(nodes: Cluster, ray_directory: str, tmp_path: Path):
    executor = RayExecutor(context(tmp_path), worker_factory=TinyWorker)
    executor.publish(weights())
    log = Log()
    try:
        before = outcome(list(executor.run(TASKS, log)))
        first = len(executor.slots)
        joined = add(nodes, ray_directory, "late")
        for _ in range(ROUNDS_UNTIL_NOTICED):
            assert outcome(list(executor.run(TASKS, log))) == before
            if [one for one in log.named("slot_ready") if one["node"] == joined]:
                break
        assert [slot.spec.node for slot in executor.slots[first:]] == [joined]
        assert [fields["node"] for fields in log.named("slot_added")] == [joined]
    finally:
        executor.close()


def test_a_run_waits_for_a_node_that_the_cluster_is_to_get(nodes: Cluster, ray_directory: str, tmp_path: Path):
    tiers = [TIERS[0] | {"labels": {"site": "coming"}}, TIERS[1]]
    keys = {"clients": {"count": 6, "tiers": tiers}}
    with pytest.raises(
        CapacityError, match=r"(?s)After 0.1 s \(runtime.scale_up_s\) still: .*has no label site=coming"
    ):
        RayExecutor(context(tmp_path / "short", **keys, runtime={"scale_up_s": 0.1}), worker_factory=TinyWorker)
    patient = context(tmp_path / "long", **keys, runtime={"scale_up_s": 60})
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(RayExecutor, patient, worker_factory=TinyWorker)
        time.sleep(1.5)
        assert not coming.done(), "there was no node for it yet"
        add(nodes, ray_directory, "coming")
        executor = coming.result(60)
    executor.publish(weights())
    try:
        assert len(list(executor.run(TASKS, Log()))) == 6
    finally:
        executor.close()


def test_what_clients_of_a_lost_node_had_sent_is_there(nodes: Cluster, tmp_path: Path):
    """Neither updates that nobody has read yet nor states are lost with it, nor what it had of the weights."""
    made = context(tmp_path)
    first, expected = undisturbed(made)
    executor = RayExecutor(made, worker_factory=TinyWorker)
    executor.publish(weights())
    log = Log()
    try:
        before = list(executor.run(TASKS, log))
        served = Counter(int(str(fields["slot"])) for fields in log.named("task_started"))
        lost = executor.slots[served.most_common(1)[0][0]].spec.node
        lose(nodes, lost)
        noticed_by = time.monotonic() + 60
        while lost in {node.node for node in capacity()} and time.monotonic() < noticed_by:
            list(executor.run([task(0)], Log()))
        assert lost not in {node.node for node in capacity()}
        assert outcome(before) == first
        assert outcome(list(executor.run(continued(before), log))) == expected
    finally:
        executor.close()


def bound_to_two_sites(cluster: Cluster, ray_directory: str) -> dict[str, Any]:
    """Clients of either tier run at a site of their own, which has one node."""
    for number in range(2 - sum(node.cpus > 0 for node in capacity())):
        add(cluster, ray_directory, f"further{number}")
    left = [node.labels["site"] for node in capacity() if node.cpus]
    tiers = [TIERS[0] | {"labels": {"site": left[0]}}, TIERS[1] | {"labels": {"site": left[1]}}]
    return {"count": 6, "tiers": tiers}


def test_clients_bound_to_a_lost_node_wait_for_another(nodes: Cluster, ray_directory: str, tmp_path: Path):
    clients = bound_to_two_sites(nodes, ray_directory)
    made = context(tmp_path, clients=clients, runtime={"scale_up_s": 120})
    first, expected = undisturbed(made)
    executor = RayExecutor(made, worker_factory=TinyWorker)
    executor.publish(weights())

    class Replacing(Log):
        def __call__(self, name: str, fields: dict[str, object]) -> None:
            super().__call__(name, fields)
            if name == "waiting":
                add(nodes, ray_directory, site)

    log = Replacing()
    try:
        before = list(executor.run(TASKS, log))
        assert outcome(before) == first
        lost = executor.slots[0].spec.node
        (site,) = [node.labels["site"] for node in capacity() if node.node == lost]
        lose(nodes, lost)
        assert outcome(list(executor.run(continued(before), log))) == expected
        (waiting,) = log.named("waiting")
        assert "its node is lost" in str(waiting["message"])
        assert waiting["seconds"] == 120
        assert [fields["slot"] for fields in log.named("slot_added")] == [0]
        assert executor.slots[0].spec.node != lost
    finally:
        executor.close()


@pytest.mark.parametrize(("patience", "waited"), [(0.0, ""), (0.5, r"after 0\.5 s \(runtime\.scale_up_s\) ")])
def test_clients_bound_to_a_lost_node_end_the_run_with_the_reason(
    nodes: Cluster, ray_directory: str, tmp_path: Path, patience: float, waited: str
):
    made = context(tmp_path, clients=bound_to_two_sites(nodes, ray_directory), runtime={"scale_up_s": patience})
    executor = RayExecutor(made, worker_factory=TinyWorker)
    executor.publish(weights())
    log = Log()
    try:
        assert len(list(executor.run(TASKS, log))) == 6
        lose(nodes, executor.slots[0].spec.node)
        with pytest.raises(ClusterError, match=rf"No actor is {waited}left .*node is lost.*hfedmoe resume"):
            list(executor.run(TASKS, log))
        assert len(log.named("waiting")) == bool(patience)
    finally:
        executor.close()
