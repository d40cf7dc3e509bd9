"""The executor on real actors: results never depend on the mode, the number of slots, or where an actor lives."""

from pathlib import Path

import pytest
import ray
from tiny_worker import Log, TinyWorker, context, outcome, task, weights

from hfedmoe_ray.runtime.local import LocalExecutor
from hfedmoe_ray.runtime.pool import RayExecutor

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
TASKS = [task(client, present=1 + client % 3) for client in range(6)]


@pytest.fixture
def executor(tmp_path: Path, request: pytest.FixtureRequest):
    keys = getattr(request, "param", {"runtime": {"slots": 2}})
    made = RayExecutor(context(tmp_path, **keys), worker_factory=TinyWorker)
    made.publish(weights())
    yield made
    made.close()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[str, bytes]]:
    local = LocalExecutor(context(tmp_path_factory.mktemp("local")), worker_factory=TinyWorker)
    local.publish(weights())
    return outcome(list(local.run(TASKS, Log())))


@pytest.mark.parametrize(
    "executor",
    [{"actors": "dedicated"}, {"runtime": {"slots": 1}}, {"runtime": {"slots": 4}}],
    indirect=True,
    ids=["dedicated", "one slot", "four slots"],
)
def test_same_results_in_every_mode(executor: RayExecutor, expected: dict[int, tuple[str, bytes]]):
    log = Log()
    assert outcome(list(executor.run(TASKS, log))) == expected
    assert all(status == "ok" for status, _ in expected.values())
    assert {fields["client"] for fields in log.named("task_finished")} == set(range(6))


@pytest.mark.parametrize("executor", [{"actors": "dedicated"}], indirect=True)
def test_a_dedicated_client_holds_what_its_tier_asks_for(executor: RayExecutor):
    list(executor.run(TASKS, Log()))
    for slot in executor.slots:
        assigned = ray.get(slot.ping(), timeout=30)["resources"]
        tier = {"phone": 0.1, "server": 0.2}[slot.spec.tiers[0]]
        assert assigned["CPU"] == pytest.approx(tier)
        assert assigned["memory"] == int(tier * 2**30)
    names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    assert {f"tiny-client-{client:03d}" for client in range(6)} <= names
    assert ray.available_resources()["CPU"] == pytest.approx(ray.cluster_resources()["CPU"] - 3 * 0.1 - 3 * 0.2)
