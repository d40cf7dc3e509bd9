"""A cluster that other work has filled: clients wait, say for what, and give up in time or go on with what there is."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from tiny_worker import Log, TinyWorker, context, outcome, task, weights

from hfedmoe_ray.errors import CapacityError
from hfedmoe_ray.runtime import timeouts
from hfedmoe_ray.runtime.cluster import capacity
from hfedmoe_ray.runtime.local import LocalExecutor
from hfedmoe_ray.runtime.pool import RayExecutor
from hfedmoe_ray.runtime.slot import State

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
TASKS = [task(client) for client in range(6)]
TWO = {"runtime": {"slots": 2}}
"""One of 0.2 CPU, which serves every client, and one of 0.1."""


def settle(free: float) -> None:
    """Waits until the cluster knows that so many CPUs are free: what was taken or left a moment ago it learns late."""
    until = time.monotonic() + 60
    while abs(ray.available_resources().get("CPU", 0.0) - free) > 1e-6:
        assert time.monotonic() < until, "something else holds or frees CPUs"
        time.sleep(0.05)


class Others:
    """Actors of another job, which hold all CPUs but so many of each node."""

    def __init__(self, leave: float) -> None:
        class Other:
            def there(self) -> None:
                pass

        (node,) = capacity()
        whole = int(node.cpus) - 1  # Ray grants whole CPUs alone above one
        sizes = [whole] * bool(whole) + [1 - leave]
        self._actors = [ray.remote(Other).options(num_cpus=size).remote() for size in sizes]
        ray.get([actor.there.remote() for actor in self._actors], timeout=60)
        settle(leave)

    def go(self) -> None:
        """Ends them."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


@pytest.fixture
def occupied(request: pytest.FixtureRequest) -> Iterator[Others]:
    """A cluster of which others leave so many CPUs."""
    others = Others(request.param)
    yield others
    others.go()


@pytest.fixture
def executors(tmp_path: Path) -> Iterator[Callable[..., RayExecutor]]:
    """Makes executors that are closed in the end."""
    made = []

    def make(**keys: Any) -> RayExecutor:
        made.append(RayExecutor(context(tmp_path, **keys), worker_factory=TinyWorker))
        made[-1].publish(weights())
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def expected(tmp_path: Path) -> dict[int, tuple[str, bytes]]:
    local = LocalExecutor(context(tmp_path), worker_factory=TinyWorker)
    local.publish(weights())
    return outcome(list(local.run(TASKS, Log())))


@pytest.mark.usefixtures("occupied")
@pytest.mark.parametrize("occupied", [0.05], indirect=True)
@pytest.mark.parametrize("mode", [TWO, {"actors": "dedicated"}], ids=["pooled", "dedicated"])
def test_clients_that_get_no_room_end_the_run_and_say_so_before(
    mode: dict[str, Any], executors: Callable[..., RayExecutor], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(timeouts, "ROOM", 1.5)
    monkeypatch.setattr(timeouts, "ROOM_TOLD", 0.5)
    executor, log = executors(**mode), Log()
    wanted = r"x \(0\.[12] CPU, 0\.[12] GiB\) on [\d.]+, which has 0\.05 CPU, \d+\.\d GiB free"
    with pytest.raises(CapacityError, match=rf"(?s)got room within 1\.5 s: other work .*{wanted}"):
        list(executor.run(TASKS, log))
    (waiting,) = log.named("waiting")
    assert re.search(wanted, str(waiting["message"]))
    assert waiting["seconds"] == 1.5
    assert not log.named("task_started")


@pytest.mark.parametrize("occupied", [0.05], indirect=True)
def test_clients_start_when_others_make_room(
    occupied: Others,
    executors: Callable[..., RayExecutor],
    expected: dict[int, tuple[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
):
    """However long that takes: `runtime.scale_up_s` is longer than ROOM."""
    monkeypatch.setattr(timeouts, "ROOM", 0.1)
    monkeypatch.setattr(timeouts, "ROOM_TOLD", 0.5)

    class MakingRoom(Log):
        def __call__(self, name: str, fields: dict[str, object]) -> None:
            super().__call__(name, fields)
            if name == "waiting":
                occupied.go()

    executor = executors(runtime={"slots": 2, "scale_up_s": 120})
    log = MakingRoom()
    assert outcome(list(executor.run(TASKS, log))) == expected
    assert len(log.named("waiting")) == 1
    assert not log.named("slot_lost")


@pytest.mark.parametrize("occupied", [0.25], indirect=True)
def test_a_run_goes_on_with_the_slots_that_have_room_and_uses_the_others_later(
    occupied: Others,
    executors: Callable[..., RayExecutor],
    expected: dict[int, tuple[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
):
    """Room for either slot, not for both: the larger one has it, which serves every client, whoever asks Ray sooner."""
    monkeypatch.setattr(timeouts, "ROOM", 0.1)
    executor, log = executors(**TWO), Log()
    assert outcome(list(executor.run(TASKS, log))) == expected
    assert [slot.queued for slot in executor.slots] == [False, True]
    assert {fields["slot"] for fields in log.named("task_started")} == {0}
    occupied.go()
    until = time.monotonic() + 60
    while executor.slots[1].state is not State.IDLE and time.monotonic() < until:
        assert outcome(list(executor.run(TASKS, log))) == expected
    assert {fields["slot"] for fields in log.named("slot_ready")} == {0, 1}


def test_an_actor_that_starts_slowly_does_not_wait_for_room(
    executors: Callable[..., RayExecutor], expected: dict[int, tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch
):
    """Nothing but the room tells the two apart: with it, no process is there any sooner."""
    monkeypatch.setattr(timeouts, "ROOM", 0.0)
    monkeypatch.setattr(timeouts, "ROOM_TOLD", 0.0)
    settle(capacity()[0].cpus)
    executor, log = executors(**TWO), Log()
    assert outcome(list(executor.run(TASKS, log))) == expected
    assert not log.named("waiting")
