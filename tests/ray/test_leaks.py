"""Fifty rounds occupy what ten do: nothing of a round is left behind in any process or in the object store."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address
from small_run import small_experiment

from hfedmoe_ray.runtime import session

pytestmark = pytest.mark.ray
ROUNDS = 50
EARLY, LATE = range(11, 16), range(45, 50)
"""When it is looked, each time: the least of five rounds counts, as a round's updates come and go while one looks."""
ALLOWED = {"driver": 16.0, "ServerActor": 24.0, "ClientActor": 48.0, "object store": 4.0}
"""MiB by which each may differ: what allocators keep moves up and down by some."""


def own(process: psutil.Process) -> int:
    """Bytes of a process's anonymous pages (see `train.memory`).

    Not its unique set: files are in that, and become its own when the last other process that maps them ends.
    """
    memory = process.memory_info()
    return int(memory.rss - memory.shared)


def occupied() -> Mapping[str, float]:
    """MiB that each kind of process has to itself, all clients together, and what lies in the object store."""
    this = psutil.Process()
    found = {"driver": float(own(this)), "ServerActor": 0.0, "ClientActor": 0.0}
    for process in this.children(recursive=True):
        kind = process.name().removeprefix("ray::").partition(".")[0].partition(" ")[0]
        if kind in found:
            found[kind] += own(process)
    state = get_state_from_address(ray.get_runtime_context().gcs_address)
    found["object store"] = float(get_memory_info_reply(state).store_stats.object_store_bytes_used)
    return {name: size / 2**20 for name, size in found.items()}


def test_fifty_rounds_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # Ray frees objects a second after nobody refers to them any more, which is two rounds here: now at once.
    monkeypatch.setenv("RAY_free_objects_period_milliseconds", "10")
    sizes: dict[int, Mapping[str, float]] = {}

    def render(name: str, fields: Any) -> None:
        if name == "round" and fields.round in (*EARLY, *LATE):
            sizes[fields.round] = occupied()

    def least(rounds: range) -> dict[str, float]:
        return {name: min(sizes[number][name] for number in rounds) for name in sizes[rounds[0]]}

    keys = [f"rounds={ROUNDS}", "evaluate.every=100", "evaluate.own=never", "runtime.slots=2", "wire.upload=int8"]
    keys += ["data.max_length=16", "local.batch_size=4"]  # what is left behind would be as much
    session.run(small_experiment(keys), tmp_path, resume=False, render=render)
    early, late = least(EARLY), least(LATE)
    assert early["ClientActor"] > 100, f"the clients were not found: {early}"
    assert early["object store"] > 0
    grown = {name: late[name] - early[name] for name in early}
    assert all(grown[name] <= most for name, most in ALLOWED.items()), f"grown by {grown} MiB from {early}"
