"""Secure aggregation on real actors: who is killed at which step, and that nothing else changes."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from secure_worker import DroppingWorker, Faults
from tiny_federation import Recorder, experiment, run

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.federation.executor import Executor
from hfedmoe_ray.runtime.local import LocalExecutor
from hfedmoe_ray.runtime.pool import RayExecutor

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
TIERS = [
    {"name": "phone", "share": 0.5, "experts": 0.25, "device": 0.1},
    {"name": "server", "share": 0.5, "experts": 0.5, "device": 0.1},
]


def on_ray(faults: Faults, context: RunContext) -> Executor:
    return RayExecutor(context, worker_factory=partial(DroppingWorker, faults=faults))


def here(faults: Faults, context: RunContext) -> Executor:
    return LocalExecutor(context, worker_factory=partial(DroppingWorker, faults=faults))


def aggregated(recorder: Recorder) -> dict[str, Any]:
    (told,) = [fields for name, fields in recorder.events if name == "aggregated"]
    return told


@pytest.mark.chaos
def test_clients_killed_between_the_steps_leave_the_sum_of_the_others(sources: Path, tmp_path: Path):
    """Client 2 dies with its secrets shared and no upload, each time that it is tried, and 1 fails to help unmasking.

    Client 3 dies once, when it has masked its update: what another process does again is the same to the last bit.
    """
    made = experiment(
        sources,
        strategy="fedavg",
        rounds=1,
        clients={"count": 6, "tiers": TIERS},
        evaluate={"own": "never"},
        secure={"variant": "grouped"},
        runtime={"slots": 2},
    )
    faults: Faults = {("train", 2): "die", ("upload", 3): "die once", ("unmask", 1): "fail"}
    _, there, recorder = run(made, tmp_path / "there", where=partial(on_ray, faults))
    told = aggregated(recorder)
    assert told["shares"] == [0, 1, 2, 3, 4, 5]
    assert told["delivered"] == [0, 1, 3, 4, 5]
    assert told["unmasked"] == [0, 3, 4, 5]
    assert (tmp_path / "there" / "died-upload-3").exists()
    assert told["silent"] == {1: "RuntimeError: client 1 is gone"}
    records = {record.client: record for record in recorder.rounds[-1].clients}
    assert [client for client, record in records.items() if record.status != "ok"] == [2]
    assert "died 2 times" in records[2].reason
    assert [f for name, f in recorder.events if name == "task_retried" and (f["kind"], f["client"]) == ("upload", 3)]
    _, plain, expected = run(made, tmp_path / "here", where=partial(here, {("train", 2): "fail"}))
    assert aggregated(expected)["unmasked"] == [0, 1, 3, 4, 5]
    assert there["model_sha256"] == plain["model_sha256"]
