"""What is frozen exists once on a node and cannot be written: as the operating system tells it, on real actors."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from frozen_worker import KEY, FrozenWorker
from mapped import mapping
from tiny_worker import SHAPE, Log, context, task

from hfedmoe_ray.runtime.pool import RayExecutor
from hfedmoe_ray.runtime.protect import protected
from hfedmoe_ray.types import Weights

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
NUMBERS = np.arange(200_000, dtype=np.float32)


@pytest.fixture
def executor(tmp_path: Path) -> Iterator[RayExecutor]:
    keys = {"actors": "dedicated", "clients": {"count": 2, "tiers": [{"name": "a", "share": 1, "experts": 0.5}]}}
    keys["clients"]["tiers"][0] |= {"device": 0.2, "memory_gib": 0.5}
    made = RayExecutor(context(tmp_path, **keys), worker_factory=FrozenWorker)
    experts = {key: {"up": NUMBERS + key.expert, "down": NUMBERS[:100]} for key in SHAPE.keys()}  # noqa: SIM118
    made.publish(Weights(version=0, shared={"router": np.zeros(3)}, experts=experts))
    yield made
    made.close()


def found_by(executor: RayExecutor, *clients: int) -> dict[int, dict[str, int]]:
    results = {result.task.client: result for result in executor.run([task(one) for one in clients], Log())}
    assert {client: result.status for client, result in results.items()} == dict.fromkeys(clients, "ok")
    return {client: json.loads(result.payload()) for client, result in results.items()}


def test_a_frozen_expert_of_two_clients_is_the_same_physical_memory(executor: RayExecutor):
    found = found_by(executor, 0, 1)
    pids = [ray.get(slot.ping(), timeout=30)["pid"] for slot in executor.slots]
    assert pids[0] != pids[1]
    (one, rights, counts), (other, _, _) = (mapping(pid, found[client]["address"]) for client, pid in enumerate(pids))
    assert one == other
    assert one[1] != "0", "memory that no file or shared memory backs is nobody else's"
    assert rights == "r--s"
    size = found[0]["bytes"] / 1024
    assert counts["Private_Dirty"] + counts["Private_Clean"] == 0
    assert counts["Shared_Dirty"] + counts["Shared_Clean"] >= size
    assert counts["Pss"] <= 0.7 * counts["Rss"]


def test_who_writes_to_a_frozen_expert_dies_alone_and_changes_nothing(executor: RayExecutor, tmp_path: Path):
    before = found_by(executor, 0, 1)
    other = ray.get(executor.slots[1].ping(), timeout=30)["pid"]
    (tmp_path / "run" / "write").touch()
    log = Log()
    results = {result.task.client: result for result in executor.run([task(0), task(1)], log)}
    assert results[1].status == "ok"
    assert json.loads(results[1].payload())["sum"] == before[1]["sum"]
    assert results[0].status == "failed"
    assert "its process died 2 times" in results[0].reason
    assert {fields["slot"] for fields in log.named("slot_lost")} == {0}
    (tmp_path / "run" / "write").unlink()
    # The offender's replacement, the other client and the server all still have the published bytes.
    assert {one["sum"] for one in found_by(executor, 0, 1).values()} == {before[1]["sum"]}
    assert ray.get(executor.slots[1].ping(), timeout=30)["pid"] == other
    published = executor._store.refs(task(0)).fetch().experts[KEY]["up"]
    assert np.array_equal(published, NUMBERS + KEY.expert)


@pytest.mark.parametrize(
    "array",
    [NUMBERS, NUMBERS.reshape(100, 2000).T, NUMBERS[::2], NUMBERS[:3], NUMBERS[:0], np.array(1.0)],
    ids=["large", "transposed", "strided", "small", "empty", "scalar"],
)
def test_values_and_shapes_stay_what_they_were(array: np.ndarray):
    fetched = ray.get(ray.put({"array": array}))
    seen = protected(fetched)["array"]
    assert seen.shape == array.shape
    assert seen.dtype == array.dtype
    assert np.array_equal(seen, array)
    assert not seen.flags.writeable


def test_the_second_mapping_lives_as_long_as_it_is_used_and_no_longer():
    def rights(address: int) -> str:
        return mapping(os.getpid(), address)[1]

    fetched = ray.get(ray.put({"array": NUMBERS}))
    seen = protected(fetched)["array"][5:]
    address = seen.ctypes.data
    del fetched
    assert rights(address) == "r--s"
    assert np.array_equal(seen, NUMBERS[5:])
    del seen
    assert rights(address) != "r--s"
