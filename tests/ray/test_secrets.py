"""Tokens of the environment are shown nowhere: not in files, output, Ray's logs and tables, or command lines."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from leaks import commands_with, files_with
from small_run import CONFIG, OVERRIDES

pytestmark = pytest.mark.ray
SECRETS = {
    "WANDB_API_KEY": "5ec4e7" * 6 + "abcd",
    "HF_TOKEN": "hf_" + "S3cretOfTheHub" * 3,
    "RAY_AUTH_TOKEN": "5ec4e70f" * 8,
    "MLFLOW_TRACKING_PASSWORD": "secret-of-mlflow",
    "MLFLOW_TRACKING_URI": "http://user:secret-of-the-uri@127.0.0.1:9",
}
AT_ONCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""MLflow would try for a minute, and the end of the run wait for it."""
VALUES = (*list(SECRETS.values())[:4], "secret-of-the-uri")


def test_a_run_shows_no_secret_of_its_environment(tmp_path: Path):
    """With trackers that would use them: W&B writes a run to be sent later, MLflow cannot be reached."""
    run = [str(CONFIG), *OVERRIDES, "rounds=1", "clients.count=2", "name=secret", f"output={tmp_path}"]
    keys = ["tracking.wandb.mode=offline", "tracking.mlflow={}", "runtime.slots=1"]
    command = [sys.executable, "-m", "hfedmoe_ray.cli", "run", *run, *keys]
    seen, leaked = set(), set()
    with (tmp_path / "printed").open("w") as out:
        process = psutil.Popen(command, env=os.environ | SECRETS | AT_ONCE, stdout=out, stderr=subprocess.STDOUT)
        while process.poll() is None:
            family = [process, *children(process)]
            seen |= {name(one) for one in family}
            leaked |= set(commands_with(VALUES, family))
            logs = Path("/tmp").glob(f"hfedmoe-ray-{process.pid}-*")
            leaked |= set(files_with(VALUES, *(directory / "session_latest" / "logs" for directory in logs)))
            time.sleep(0.3)
    printed = (tmp_path / "printed").read_text()
    assert process.returncode == 0, printed
    assert {"raylet", "gcs_server"} <= seen, "the watch saw nothing of Ray"
    assert "MLflow" in printed, "it was not tried"
    assert list((tmp_path / "secret" / "wandb").rglob("*.wandb")), "it was not written"
    assert not leaked
    assert not files_with(VALUES, tmp_path)


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""
