"""Clients that die amid their steps, or send what must not be averaged, in whole runs of real workers.

Uploads are top-k with error feedback: clients have a state, which must not survive an update that was not used.
"""

import random
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from faulty_worker import LIES, Faults, FaultyWorker
from tiny_federation import Recorder, experiment, run

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.errors import TrainingError
from hfedmoe_ray.federation.executor import Executor
from hfedmoe_ray.runtime.local import LocalExecutor
from hfedmoe_ray.runtime.pool import RayExecutor

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.usefixtures("cluster")]
STEPS = 6
TIERS = [
    {"name": "phone", "share": 0.5, "experts": 0.25, "device": 0.1},
    {"name": "server", "share": 0.5, "experts": 0.5, "device": 0.1},
]
REASONS = {
    "nan": "NaN or infinity",
    "infinite": "NaN or infinity",
    "huge": "times the",
    "shape": "cannot be read: expert .* values is float32",
    "type": "cannot be read: expert .* float64",
    "foreign": "which it was not assigned",
    "unclaimed": "which it does not say it trained",
    "truncated": "not a safetensors payload",
    "pickled": "not a safetensors payload",
    "empty": "not a safetensors payload",
    "padded": "its update is .* bytes, and can be",
    "untrained": "took steps on expert .*, unchanged",
    "examples": "claims 1000000000000 training examples",
    "nested": "metrics cannot be read: it is nested too deeply",
    "endless": "metrics cannot be read: a number in it is too large",
    "another": "answers for client",
}
"""What each lie is rejected for."""


def made(sources: Path, **changes: Any):
    """Three rounds of clients with a state of their own."""
    local = {"steps": STEPS, "batch_size": 2, "learning_rate": 1e-2, "profile_examples": 4}
    base = {"rounds": 3, "local": local, "wire": {"upload": "topk", "share": 0.05}, "evaluate": {"own": "never"}}
    return experiment(sources, **(base | changes))


def on_ray(faults: Faults, context: RunContext) -> Executor:
    return RayExecutor(context, worker_factory=partial(FaultyWorker, faults=faults))


def here(faults: Faults, context: RunContext) -> Executor:
    return LocalExecutor(context, worker_factory=partial(FaultyWorker, faults=faults))


def run_with(faults: Faults, where: Any, *arguments: Any, **options: Any) -> tuple[dict[str, Any], Recorder]:
    return run(*arguments, where=partial(where, faults), **options)[1:]


@pytest.fixture(scope="module")
def undisturbed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    summary, _ = run_with({}, here, made(sources), tmp_path_factory.mktemp("undisturbed"))
    return str(summary["model_sha256"])


def test_clients_killed_amid_their_steps_change_nothing(sources: Path, tmp_path: Path, undisturbed: str):
    rng = random.Random(0)
    faults = {(round, rng.randrange(4)): rng.randrange(1, STEPS) for round in (1, 2, 3)}
    summary, recorder = run_with(faults, on_ray, made(sources, runtime={"slots": 2}), tmp_path)
    died = {path.name: int(path.read_text()) for path in tmp_path.glob("died-*")}
    assert died == {f"died-{round}-{client}": steps for (round, client), steps in faults.items()}
    retried = [(told["round"], told["client"]) for name, told in recorder.events if name == "task_retried"]
    assert sorted(retried) == sorted(faults)
    assert summary["clients"]["ok"] == 4 * 4
    assert summary["model_sha256"] == undisturbed


def test_what_must_not_be_averaged_is_as_if_it_had_never_been_sent(sources: Path, tmp_path: Path):
    """In one round every liar sends something else; in the next all are honest again."""
    count = len(LIES) + 3
    data = made(sources).data.model_dump(mode="json")
    data["partition"]["min_examples"] = 4  # there are that many lies
    clients = {"count": count, "tiers": TIERS}
    config = made(sources, rounds=2, clients=clients, data=data, runtime={"slots": 2, "quorum": 0.1})
    lies = {(1, 2 + client): lie for client, lie in enumerate(LIES)}
    summary, recorder = run_with(lies, on_ray, config, tmp_path / "lies")
    assert summary["clients"] == {
        "ok": 3 * count - len(LIES),
        "late": 0,
        "failed": 0,
        "rejected": len(LIES),
        "dropped": 0,
        "memory": 0,
    }
    told = {fields["client"]: fields for name, fields in recorder.events if name == "client" and fields["round"] == 1}
    for (_, client), lie in lies.items():
        assert (told[client]["status"], told[client]["bytes_up"]) == ("rejected", 0)
        assert re.search(REASONS[lie], told[client]["reason"]), (lie, told[client]["reason"])
    absent = {where: f"client {where[1]} is away" for where in lies}
    without, _ = run_with(absent, here, config, tmp_path / "absent")
    assert without["clients"]["failed"] == len(LIES)
    assert summary["model_sha256"] == without["model_sha256"]


def test_an_error_all_clients_share_ends_the_run_with_its_traceback_and_the_run_can_go_on(
    sources: Path, tmp_path: Path, undisturbed: str
):
    faults = {(2, client): "the disk of the data is gone" for client in range(4)}
    with pytest.raises(TrainingError, match=r"4 clients failed with the same error: RuntimeError: the disk") as ended:
        run_with(faults, on_ray, made(sources, runtime={"slots": 2}), tmp_path)
    assert re.search(r"Traceback(?s:.*)faulty_worker.py.*in execute", str(ended.value))
    summary, recorder = run_with({}, here, made(sources), tmp_path, resume=True)
    assert [report.round for report in recorder.rounds] == [1, 2, 3], "round 1 was still to be evaluated"
    assert summary["model_sha256"] == undisturbed
