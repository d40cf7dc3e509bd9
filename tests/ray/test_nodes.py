"""Several nodes: clients stay where their labels say, and nodes without the prepared files receive them."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.state import list_actors
from tiny_worker import TIERS, Log, TinyWorker, context, outcome, task, weights

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.errors import CapacityError, ClusterError
from hfedmoe_ray.runtime import timeouts
from hfedmoe_ray.runtime.cluster import capacity, connected
from hfedmoe_ray.runtime.local import LocalExecutor
from hfedmoe_ray.runtime.nodes import NodeMeters
from hfedmoe_ray.runtime.pool import RayExecutor
from hfedmoe_ray.runtime.transfer import Directory, directory_hash

pytestmark = pytest.mark.ray
TASKS = [task(client) for client in range(6)]
LABELLED = [TIERS[0] | {"labels": {"site": "a"}}, TIERS[1] | {"labels": {"site": "b"}}]


@pytest.fixture(scope="module")
def sites(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, ray_directory: str
) -> Iterator[dict[str, Path]]:
    """A head without CPUs and two sites, each with a working directory and a cache of its own."""
    request.getfixturevalue("workers_import_tests")
    places = {name: tmp_path_factory.mktemp(name) for name in ("head", "a", "b")}
    cluster = Cluster()
    with pytest.MonkeyPatch.context() as patch:
        for name, place in places.items():
            patch.chdir(place)
            patch.setenv("HFEDMOE_CACHE", str(place / "cache"))
            size = {"num_cpus": 0 if name == "head" else 1, "object_store_memory": 2**27, "memory": 2**30}
            cluster.add_node(**size, labels={} if name == "head" else {"site": name}, temp_dir=ray_directory)
        patch.chdir(places["head"])
        with connected(cluster.address):
            yield places
    cluster.shutdown()


@pytest.fixture
def prepared(sites: dict[str, Path]) -> RunContext:
    """A run whose files have relative paths: they exist below the head's working directory alone."""
    made = context(sites["head"], clients={"count": 6, "tiers": LABELLED})
    return replace(made, model=replace(made.model, path=Path("model")), data=replace(made.data, path=Path("data")))


def test_clients_run_on_the_node_with_their_label_and_the_files_they_lacked(
    prepared: RunContext, sites: dict[str, Path]
):
    label_of = {node.node: node.labels.get("site") for node in capacity()}
    local = LocalExecutor(prepared, worker_factory=TinyWorker)
    executor = RayExecutor(prepared, worker_factory=TinyWorker)
    log = Log()
    try:
        for one in (local, executor):
            one.publish(weights())
        assert outcome(list(executor.run(TASKS, log))) == outcome(list(local.run(TASKS, Log())))
        for slot in executor.slots:
            tiers = {"a": ("phone",), "b": ("server",)}[str(label_of[ray.get(slot.ping(), timeout=30)["node"]])]
            assert slot.spec.tiers == tiers
    finally:
        executor.close()
    assert log.named("files_sent")
    for site in ("a", "b"):
        received = {path.name for path in (sites[site] / "cache" / "received").iterdir() if path.is_dir()}
        assert received == {directory_hash(Path("model")), directory_hash(Path("data"))}


def test_received_files_are_kept_for_the_next_run(prepared: RunContext):
    executor = RayExecutor(prepared, worker_factory=TinyWorker)
    executor.publish(weights())
    log = Log()
    try:
        assert all(result.status == "ok" for result in executor.run(TASKS, log))
    finally:
        executor.close()
    assert not log.named("files_sent")


@pytest.mark.usefixtures("sites")
def test_a_label_no_node_has_is_refused():
    tiers = [TIERS[0] | {"share": 1.0, "labels": {"site": "c"}}]
    wanted = context(Path.cwd(), clients={"count": 6, "tiers": tiers})
    with pytest.raises(CapacityError, match="has no label site=c"):
        RayExecutor(wanted, worker_factory=TinyWorker)


@pytest.mark.usefixtures("sites")
def test_files_changed_after_they_were_offered_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "base.bin").write_bytes(b"one")
    directory = Directory(path=tmp_path / "model", sha256=directory_hash(tmp_path / "model"))
    (tmp_path / "model" / "base.bin").write_bytes(b"two")
    monkeypatch.setenv("HFEDMOE_CACHE", str(tmp_path / "cache"))
    assert directory.find() is None, "another content under the same path was accepted"
    with pytest.raises(ClusterError, match="differ from those the server offered"):
        directory.offered().find()
    assert not [path for path in (tmp_path / "cache" / "received").iterdir() if path.is_dir()]


def test_a_directory_hash_sees_names_and_bytes(tmp_path: Path):
    contents = [{"a": b"1"}, {"b": b"1"}, {"a": b"2"}, {"a": b"1", "b": b""}, {"x/a": b"1"}]
    hashes = set()
    for number, files in enumerate(contents):
        for name, data in files.items():
            path = tmp_path / str(number) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        hashes.add(directory_hash(tmp_path / str(number)))
    assert len(hashes) == len(contents)


def test_each_node_says_how_busy_it_is_through_an_actor_that_is_light(sites: dict[str, Path]):
    meters = NodeMeters()
    try:
        until = time.monotonic() + 30  # an actor's process has to start first
        while len(found := meters.read()) < len(sites) and time.monotonic() < until:
            time.sleep(0.2)
        assert [row.node for row in found] == [0, 1, 2]
        assert all(0 <= row.cpu_percent <= 100 and 0 < row.memory_percent < 100 for row in found)
        started = time.monotonic()
        assert len(meters.read()) == 3
        assert time.monotonic() - started < timeouts.USAGE
        actors = [psutil.Process(pid) for pid in pids("UsageMeter")]
        assert len(actors) == 2, "none on the server's own node"
        for actor in actors:
            assert not [one.path for one in actor.memory_maps() if "torch" in one.path]
            assert actor.memory_full_info().pss < 120 * 2**20
    finally:
        meters.close()
    psutil.wait_procs(actors, timeout=10)
    assert not [actor for actor in actors if actor.is_running()]


def pids(name: str) -> list[int]:
    """Processes of this cluster's live actors of a class."""
    return [
        actor.pid for actor in list_actors(filters=[("class_name", "=", name), ("state", "=", "ALIVE")], detail=True)
    ]
