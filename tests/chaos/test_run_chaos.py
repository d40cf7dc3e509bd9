"""Whole runs that are disturbed end with the model of the undisturbed run.

Their uploads are top-k with error feedback: then clients have a state, which must neither be lost nor used twice.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_run import CONFIG, OVERRIDES, REPOSITORY, small_experiment

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.runtime import session

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
GONE_WITHIN = 120
LOSSY = ("wire.upload=topk", "wire.share=0.05")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    run_dir = tmp_path_factory.mktemp("undisturbed")
    experiment = small_experiment(["backend=local", *LOSSY])
    summary = session.run(experiment, run_dir, resume=False, render=lambda _name, _fields: None)
    return str(summary["model_sha256"])


def test_killing_a_client_in_round_two_changes_nothing(tmp_path: Path, undisturbed: str):
    pids: dict[int, int] = {}
    killed: list[int] = []
    told: list[str] = []

    def render(name: str, fields: Any) -> None:
        told.append(name)
        if name == "slot_ready":
            pids[fields["slot"]] = fields["pid"]
        if name == "task_started" and (fields["kind"], fields["round"]) == ("train", 2) and not killed:
            killed.append(fields["client"])
            os.kill(pids[fields["slot"]], signal.SIGKILL)

    experiment = small_experiment(["runtime.slots=2", *LOSSY])
    summary = session.run(experiment, tmp_path, resume=False, render=render)
    assert killed
    assert told.count("slot_lost") == 1
    assert summary["model_sha256"] == undisturbed


def start(output: Path) -> subprocess.Popen[str]:
    """`hfedmoe run` in a process of its own, watched until it has finished round 1."""
    keys = [*OVERRIDES, *LOSSY, f"output={output}"]
    command = [sys.executable, "-u", "-m", "hfedmoe_ray.cli", "run", str(CONFIG), *keys]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "round 1/3" in line:
            return process
    raise AssertionError("the run ended before round 1")


def resume(run_dir: Path) -> dict[str, Any]:
    """`hfedmoe resume` and the summary it leaves."""
    command = [sys.executable, "-m", "hfedmoe_ray.cli", "resume", str(run_dir)]
    subprocess.run(command, check=True, cwd=REPOSITORY, stdout=subprocess.PIPE)
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return summary


def test_killing_the_driver_kills_everything_and_the_run_can_be_resumed(tmp_path: Path, undisturbed: str):
    process = start(tmp_path)
    # Ray's own agents end by themselves too, but take a minute or more to notice.
    family = [p for p in psutil.Process(process.pid).children(recursive=True) if "Agent" not in p.name()]
    assert len([p for p in family if p.name().startswith(("ray::ClientActor", "ray::ServerActor"))]) > 1
    process.kill()
    process.wait(timeout=GONE_WITHIN)
    _, alive = psutil.wait_procs(family, timeout=GONE_WITHIN)
    assert not alive, "processes outlived their driver"
    assert resume(tmp_path / "quickstart")["model_sha256"] == undisturbed


def test_ctrl_c_stops_after_a_checkpoint_and_another_backend_can_resume(tmp_path: Path, undisturbed: str):
    """A terminal sends Ctrl-C to every process of the run, Ray's included."""
    process = start(tmp_path)
    os.killpg(process.pid, signal.SIGINT)
    rest, _ = process.communicate(timeout=GONE_WITHIN)
    assert process.returncode == 130
    assert "stopping after this round" in rest
    stopped = json.loads((tmp_path / "quickstart" / "summary.json").read_text())
    assert stopped["status"] == "stopped"
    experiment = load_experiment(tmp_path / "quickstart" / "config.yaml", ["backend=local"])
    summary = session.run(experiment, tmp_path / "quickstart", resume=True, render=lambda _name, _fields: None)
    assert summary["model_sha256"] == undisturbed
