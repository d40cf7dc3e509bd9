"""A client that really runs out of memory is demoted until it fits, and nobody else notices."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from greedy_worker import GREEDY, GreedyWorker
from small_run import small_experiment
from tiny_worker import Log, context, task, weights

from hfedmoe_ray.runtime.federate import federate
from hfedmoe_ray.runtime.pool import RayExecutor

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.usefixtures("cluster")]
SCARCE, HOPELESS = 1, 2
BATCH = 256
ROOM = {"ample": 8.0, "scarce": 0.45, "hopeless": 0.15}
"""GiB of the three clients' devices; an idle process takes more than the last one has."""


def keys(**scarce: Any) -> list[str]:
    """Three clients, each alone in its tier, and batches whose activations take about 0.3 GiB."""
    tiers = [
        {"name": name, "share": 1 / 3, "experts": 0.5, "device": 0.2, "memory_gib": room} for name, room in ROOM.items()
    ]
    tiers[SCARCE] |= scarce
    return [
        f"clients.tiers={tiers}",
        "clients.count=3",
        "data.max_examples=1200",
        f"local.batch_size={BATCH}",
        "rounds=2",
    ]


def run(directory: Path, overrides: list[str]) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    events: list[tuple[str, Any]] = []

    def render(name: str, fields: Any) -> None:
        if isinstance(fields, Mapping):
            events.append((name, fields))

    summary = federate(
        small_experiment(overrides),
        directory,
        resume=False,
        make_executor=RayExecutor,
        render=render,
        should_stop=lambda: False,
    )
    return summary, events


def test_activations_that_do_not_fit_are_made_to_and_the_model_is_that_of_a_run_configured_so(tmp_path: Path):
    summary, events = run(tmp_path / "capped", keys())
    told = [(name, fields) for name, fields in events if fields.get("client") == SCARCE]
    steps = [fields for name, fields in told if name == "demoted"]
    assert {(fields["round"], fields["kind"]) for fields in steps} == {(1, "train")}, "it stays with what fits"
    trained = [fields for name, fields in told if name in ("demoted", "task_started") and fields["kind"] == "train"]
    assert ["to" in fields for fields in trained] == [False, *[True, False] * len(steps), False], "an identical retry"
    assert not [fields for name, fields in events if name in ("slot_lost", "task_retried")]

    fits = int(steps[-1]["to"].split()[0])
    assert fits == BATCH >> len(steps)
    configured, _ = run(tmp_path / "configured", keys(micro_batch=fits, memory_gib=ROOM["ample"]))
    assert (configured["model_sha256"], configured["training_failures"]) == (summary["model_sha256"], 0)

    assert (summary["status"], summary["training_failures"]) == ("finished", 1 / 4)
    assert summary["clients"] == dict.fromkeys(summary["clients"], 0) | {"ok": 6, "memory": 3}
    results = [fields for name, fields in events if name == "client" and fields["round"] > 0]
    assert {fields["client"]: fields["status"] for fields in results} == {0: "ok", SCARCE: "ok", HOPELESS: "memory"}
    (reason,) = {fields["reason"].split("(")[0] for fields in results if fields["client"] == HOPELESS}
    assert reason.startswith("out of memory even with one example at once")


@pytest.mark.parametrize("native", [False, True], ids=["python", "native"])
def test_what_is_beyond_a_client_s_memory_fails_in_it_alone_and_once(tmp_path: Path, native: bool):
    """An allocation fails; where that ends the process, it still counts as memory and is not tried again."""
    made = context(tmp_path, runtime={"slots": 2, "deadline_s": 60})
    if native:
        (tmp_path / "run" / "native").touch()
    executor, log = RayExecutor(made, worker_factory=GreedyWorker), Log()
    try:
        executor.publish(weights())
        results = {result.task.client: result for result in executor.run([task(one) for one in range(6)], log)}
        assert {client: result.status for client, result in results.items()} == {
            client: "memory" if client == GREEDY else "ok" for client in range(6)
        }
        assert [fields["attempt"] for fields in log.named("task_started")] == [1] * 6
        assert len(log.named("slot_lost")) == native
        assert ("died out of memory" if native else "MemoryError") in results[GREEDY].reason
        again = {result.task.client: result for result in executor.run([task(one) for one in range(6)], log)}
        assert {client: result.status for client, result in again.items() if client != GREEDY} == dict.fromkeys(
            [0, 1, 2, 4, 5], "ok"
        )
        assert "idle" not in again[GREEDY].reason, "what did not fit has been given back"
    finally:
        executor.close()
