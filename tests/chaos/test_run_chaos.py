"""Whole runs that are disturbed end with the model of the undisturbed run.

Their uploads are top-k with error feedback: then clients have a state, which must neither be lost nor used twice.
"""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_run import CONFIG, OVERRIDES, REPOSITORY, small_experiment

from hfedmoe_ray.cli import main
from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.errors import CheckpointError, ClusterError
from hfedmoe_ray.runtime import session
from hfedmoe_ray.tracking import wandb as tracking
from hfedmoe_ray.train.local import ClientWorker
from hfedmoe_ray.types import ClientTask

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
GONE_WITHIN = 120
SLACK = 10
"""Seconds that other work on the machine may take from what is timed."""
LOSSY = ("rounds=4", "wire.upload=topk", "wire.share=0.05")


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing disturbs, and that evaluates each round at once."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    experiment = small_experiment(["backend=local", *LOSSY])
    session.run(experiment, run_dir, resume=False, render=lambda _name, _fields: None)
    return run_dir


@pytest.fixture(scope="module")
def undisturbed(calm: Path) -> str:
    return str(json.loads((calm / "summary.json").read_text())["model_sha256"])


def measured(run_dir: Path) -> list[tuple[int, float, float]]:
    """(round, accuracy, loss) of every line of its record."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [(line["round"], line["accuracy"], line["test_loss"]) for line in lines]


def start(output: Path) -> subprocess.Popen[str]:
    """`hfedmoe run` in a process of its own, watched until round 0 is told, which is when round 1 has trained."""
    keys = [*OVERRIDES, *LOSSY, "runtime.slots=1", f"output={output}"]
    command = [sys.executable, "-u", "-m", "hfedmoe_ray.cli", "run", str(CONFIG), *keys]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "round 0/4" in line:
            return process
    raise AssertionError("the run ended before it told of round 0")


def test_killing_the_driver_kills_everything_and_the_run_can_be_resumed(tmp_path: Path, undisturbed: str, calm: Path):
    process = start(tmp_path)
    # Ray's own agents end by themselves too, but take a minute or more to notice.
    family = [p for p in psutil.Process(process.pid).children(recursive=True) if "Agent" not in p.name()]
    assert len([p for p in family if p.name().startswith(("ray::ClientActor", "ray::ServerActor"))]) > 1
    process.kill()
    process.wait(timeout=GONE_WITHIN)
    _, alive = psutil.wait_procs(family, timeout=GONE_WITHIN)
    assert not alive, "processes outlived their driver"
    assert main(["resume", str(tmp_path / "quickstart")]) == 0
    assert json.loads((tmp_path / "quickstart" / "summary.json").read_text())["model_sha256"] == undisturbed
    assert measured(tmp_path / "quickstart") == measured(calm)


def test_ctrl_c_stops_after_a_checkpoint_and_another_backend_can_resume(tmp_path: Path, undisturbed: str):
    """A terminal sends Ctrl-C to every process of the run, Ray's included."""
    process = start(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=GONE_WITHIN)
    assert process.returncode == 130
    assert "stopping after this round" in rest
    stopped = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    assert stopped["status"] == "stopped"
    assert f"report: {tmp_path / 'quickstart' / 'report.html'}" in rest
    assert [round for round, accuracy, _ in measured(tmp_path / "quickstart") if accuracy is not None] == list(
        range(stopped["rounds"] + 1)
    )
    experiment = load_experiment(tmp_path / "quickstart" / "config.yaml", ["backend=local"])
    summary = session.run(experiment, tmp_path / "quickstart", resume=True, render=lambda _name, _fields: None)
    assert summary["model_sha256"] == undisturbed


def test_killed_clients_change_nothing_and_a_server_killed_while_it_saves_loses_nothing(
    tmp_path: Path, undisturbed: str, calm: Path
):
    """A client that trains in round 2 and one that evaluates round 1, in either order; the server between the reduction
    of round 3 and the renaming of its checkpoint.
    """
    pids: dict[int, int] = {}
    clients: set[tuple[str, int]] = set()
    told: list[str] = []
    server: list[int] = []
    over = threading.Event()

    def render(name: str, fields: Any) -> None:
        told.append(name)
        if name == "slot_ready":
            pids[fields["slot"]] = fields["pid"]
        if name == "task_started":
            what = fields["kind"], fields["round"]
            if what in (("train", 2), ("evaluate", 1)) and what not in clients:
                clients.add(what)
                os.kill(pids[fields["slot"]], signal.SIGKILL)

    def kill_when_saving() -> None:
        while not over.wait(0.001) and not server:
            if any((tmp_path / "checkpoints").glob(".round-0003.*")):
                family = psutil.Process().children(recursive=True)
                (found,) = [p.pid for p in family if p.name().startswith("ray::ServerActor")]
                os.kill(found, signal.SIGKILL)
                server.append(found)

    watcher = threading.Thread(target=kill_when_saving)
    watcher.start()
    try:
        with pytest.raises(ClusterError, match=r"server process of the run died.*hfedmoe resume"):
            session.run(small_experiment(["runtime.slots=2", *LOSSY]), tmp_path, resume=False, render=render)
    finally:
        over.set()
        watcher.join()
    assert server
    assert len(clients) == told.count("slot_lost") == 2
    assert (tmp_path / "checkpoints" / "LATEST").read_text().strip() in ("round-0002", "round-0003")
    local = small_experiment(["backend=local", *LOSSY])
    summary = session.run(local, tmp_path, resume=True, render=lambda *_: None)
    assert summary["model_sha256"] == undisturbed
    assert measured(tmp_path) == measured(calm)


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Whoever writes more into a file is refused, as by a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_run_with_the_checkpoint_before_and_it_can_go_on(tmp_path: Path, undisturbed: str):
    """No file may grow beyond a few hundred kilobytes, as on a disk with so much left."""
    local = ["backend=local", *LOSSY]
    session.run(small_experiment([*local, "rounds=1"]), tmp_path, resume=False, render=lambda *_: None)
    with no_file_beyond(300_000), pytest.raises(CheckpointError, match=r"make room.*hfedmoe resume") as ended:
        session.run(small_experiment(local), tmp_path, resume=True, render=lambda *_: None)
    assert ended.value.exit_code == 8
    assert sorted(one.name for one in (tmp_path / "checkpoints").iterdir()) == ["LATEST", "round-0000", "round-0001"]
    assert (tmp_path / "checkpoints" / "LATEST").read_text() == "round-0001\n"
    summary = session.run(small_experiment(local), tmp_path, resume=True, render=lambda *_: None)
    assert summary["model_sha256"] == undisturbed


def test_a_round_below_quorum_is_repeated_and_then_ends_the_run_with_a_table(
    tmp_path: Path, undisturbed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    train = ClientWorker._train
    tried: list[tuple[int, int]] = []

    def without_disks(self: ClientWorker, task: ClientTask, *rest: Any) -> Any:
        """From round 2 on three of four clients cannot read, each for a reason of its own."""
        if task.round == 2:
            tried.append((task.round, task.client))
            if task.client:
                raise OSError(f"disk {task.client} is gone")
        return train(self, task, *rest)

    keys = [*OVERRIDES, *LOSSY, f"output={tmp_path}", "backend=local", "runtime.round_attempts=3"]
    with monkeypatch.context() as broken:
        broken.setattr(ClientWorker, "_train", without_disks)
        assert main(["run", str(CONFIG), *keys]) == 7
    # Who has delivered is not asked again.
    assert sorted(tried) == sorted([(2, 0), *[(2, client) for client in (1, 2, 3)] * 3])
    told = capsys.readouterr().err
    assert "only 1 of 4 clients delivered" in told
    assert "client 0: ok\n" in told
    for client in (1, 2, 3):
        assert f"client {client}: failed (OSError: disk {client} is gone)\n" in told
    events = [json.loads(line) for line in (tmp_path / "quickstart" / "events.jsonl").read_text().splitlines()]
    assert [one["round"] for one in events if one["event"] == "below_quorum"] == [2, 2, 2]
    assert json.loads((tmp_path / "quickstart" / "summary.json").read_text())["status"] == "failed"
    assert main(["resume", str(tmp_path / "quickstart")]) == 0
    assert json.loads((tmp_path / "quickstart" / "summary.json").read_text())["model_sha256"] == undisturbed


def test_without_its_wandb_server_a_run_is_held_up_once_and_complete(
    tmp_path: Path, undisturbed: str, monkeypatch: pytest.MonkeyPatch
):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(tracking, "INIT_TIMEOUT_S", 3.0)
    told: list[tuple[str, Any, float]] = []

    def render(name: str, fields: Any) -> None:
        told.append((name, fields, time.monotonic()))

    experiment = small_experiment(["backend=local", *LOSSY, "tracking.wandb.mode=online"])
    summary = session.run(experiment, tmp_path, resume=False, render=render)
    ended = time.monotonic()
    assert summary["model_sha256"] == undisturbed
    (warning,) = [fields["message"] for name, fields, _ in told if name == "warning"]
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1
    assert "Weights & Biases cannot be reached" in warning
    assert f"`hfedmoe wandb sync {tmp_path}`" in warning
    # The server's silence costs its timeout, once and before the first round (beside preparing and loading).
    began = next(when for name, _, when in told if name == "start")
    assert began - told[0][2] < tracking.INIT_TIMEOUT_S + SLACK
    rounds = sum(fields.seconds for name, fields, _ in told if name == "round")
    assert ended - began < rounds + SLACK
    for name, lines in (("metrics.jsonl", 5), ("events.jsonl", 5 * 4)):
        assert len((tmp_path / name).read_text().splitlines()) >= lines
    assert json.loads((tmp_path / "summary.json").read_text())["model_sha256"] == undisturbed
