"""A run as a Ray job, on a head with its token: it succeeds, its record comes home, and refusals say what to do."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from leaks import commands_with, files_with
from ray.job_submission import JobSubmissionClient
from ray.runtime_env import RuntimeEnv
from ray.util.state.common import StateResource
from small_run import CONFIG, OVERRIDES, REPOSITORY
from started_cluster import Started, started_cluster

from hfedmoe_ray.cli import main
from hfedmoe_ray.doctor import _job_server
from hfedmoe_ray.errors import ClusterError, ConfigError, DataError
from hfedmoe_ray.runtime.job_server import auth_headers
from hfedmoe_ray.runtime.jobs import submit

pytestmark = pytest.mark.ray
PATHS = (REPOSITORY, REPOSITORY / "tests")
TOKEN = "0123456789abcdef" * 4
FALSE = {"WANDB_API_KEY": "5ec4e7" * 6 + "abcd", "HF_TOKEN": "hf_" + "S3cretOfTheHub" * 3}
"""What a cluster's nodes may have in their environment, to be used and shown nowhere."""
EXAMINE = """
import sys
from hfedmoe_ray.doctor import _cluster
from small_run import small_experiment
for finding in _cluster(sys.argv[1], small_experiment(["runtime.slots=2"])):
    print(finding.level, finding.what)
"""
JOIN = """
import sys
from hfedmoe_ray.errors import ClusterError
from hfedmoe_ray.runtime.cluster import capacity, connected
try:
    with connected(sys.argv[1]):
        print(len(capacity()), "node")
except ClusterError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def started(home: Path) -> Iterator[Started]:
    """A cluster whose jobs have another home directory than ours."""
    session = tempfile.mkdtemp(prefix="hfedmoe-test-", dir="/tmp")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ours = {"HOME": str(home), "PATH": path, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    with started_cluster(session, os.environ | ours | FALSE, TOKEN) as started:
        yield started
    shutil.rmtree(session, ignore_errors=True)


@pytest.fixture
def head(started: Started) -> str:
    return started.url


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


@pytest.mark.usefixtures("token")
def test_a_submitted_run_succeeds_away_from_the_head_and_its_record_comes_home(
    started: Started, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    for name, secret in FALSE.items():
        monkeypatch.setenv(name, secret)
    run = [str(CONFIG), *OVERRIDES, "rounds=1", "runtime.slots=1", "name=job"]
    code = main(["submit", *run, "--address", started.url])
    text = capsys.readouterr().out
    assert code == 0, text
    assert "round 1/1" in text
    assert "HFEDMOE RUN" not in text
    here, there = tmp_path / "runs" / "job", home / "runs" / "job"
    names = {file.name for file in here.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "events.jsonl", "summary.json", "report.html"}
    for name in names:
        assert (here / name).read_bytes() == (there / name).read_bytes()
    assert json.loads((here / "summary.json").read_text())["status"] == "finished"
    assert (there / "checkpoints").is_dir()
    # The driver's node. The server actor goes to the same; but where several nodes share a machine, as here, Ray joins
    # a driver to the head's, so that it would say nothing.
    roles = {node["node_id"]: node["labels"]["hfedmoe-role"] for node in started.list(StateResource.NODES)}
    at = {actor["class_name"]: roles[actor["node_id"]] for actor in started.list(StateResource.ACTORS)}
    assert at["JobSupervisor"] == "server"
    assert at["ClientActor"] == "client"
    secrets = (TOKEN, *FALSE.values())
    told = [text, *map(str, started.list(StateResource.ACTORS)), *map(str, started.list(StateResource.JOBS))]
    assert len(told) > 3
    assert not [one for one in told if any(secret in one for secret in secrets)]
    assert not files_with(secrets, started.directory, home / "runs", tmp_path)
    assert not commands_with(secrets, psutil.Process().children(recursive=True))

    shutil.rmtree(here)
    assert main(["logs", "job", "--address", started.url]) == 0
    assert "round 1/1" in capsys.readouterr().out
    assert (here / "summary.json").read_bytes() == (there / "summary.json").read_bytes()
    assert main(["submit", *run, "--address", started.url]) == ConfigError.exit_code
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.usefixtures("token")
def test_a_failed_job_has_its_exit_code_and_its_paragraph(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    broken = [str(CONFIG), *OVERRIDES, "name=broken", "data.source=/nowhere/missing.jsonl"]
    assert main(["submit", *broken, "--address", head]) == DataError.exit_code
    assert "/nowhere/missing.jsonl" in capsys.readouterr().out
    assert not (tmp_path / "runs" / "broken").exists()
    assert main(["logs", "broken", "--address", head]) == DataError.exit_code
    assert main(["stop", "broken", "--address", head]) == 0
    assert "had ended already: failed" in capsys.readouterr().out


@pytest.mark.usefixtures("token")
def test_a_submitted_run_is_stopped(head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = [str(CONFIG), *OVERRIDES, "rounds=500", "name=endless", f"output={tmp_path}"]
    assert main(["submit", *run, "--no-follow", "--address", head]) == 0
    assert main(["stop", "endless", "--address", head]) == 0
    assert "stopped" in capsys.readouterr().out
    assert main(["status", "--address", head]) == 0
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("endless"))
    assert " stopped " in row
    assert main(["stop", "endles", "--address", head]) == ClusterError.exit_code
    assert "Did you mean endless?" in capsys.readouterr().err


@pytest.mark.usefixtures("token")
def test_a_comparison_is_a_job_too(head: str, home: Path):
    client = JobSubmissionClient(head, headers=auth_headers())
    overrides = [*OVERRIDES, "rounds=1", "runtime.slots=1", "name=two", "data.test_examples=20"]
    command = [sys.executable, "-u", "jobs/compare.py", "configs/quickstart.yaml", *overrides]
    command += ["--strategies", "hfedmoe,random", "--seeds", "0"]
    environment = yaml.safe_load((REPOSITORY / "jobs" / "runtime_env.yaml").read_text())
    job = client.submit_job(entrypoint=shlex.join(command), runtime_env=environment | {"working_dir": str(REPOSITORY)})
    until = time.monotonic() + 200
    while not client.get_job_status(job).is_terminal() and time.monotonic() < until:
        time.sleep(0.5)
    log = client.get_job_logs(job)
    assert client.get_job_status(job) == "SUCCEEDED", log
    compared = json.loads((home / "runs" / "two" / "comparison.json").read_text())
    assert compared["strategies"] == ["hfedmoe", "random"]
    for run in (home / "runs" / "two" / "runs").iterdir():
        assert json.loads((run / "summary.json").read_text())["status"] == "finished", log
        assert yaml.safe_load((run / "config.yaml").read_text())["backend"] == "ray"


@pytest.mark.parametrize(
    ("environment", "what"),
    [
        ({"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "wants a token, and none was found"),
        ({"RAY_AUTH_TOKEN": "f" * 64}, "refused the token"),
    ],
    ids=["no token", "wrong token"],
)
def test_a_refused_token_says_where_to_put_the_right_one(
    head: str, environment: dict[str, str], what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ClusterError, match=f"{what}.*RAY_AUTH_TOKEN_PATH.*get-auth-token"):
        submit(CONFIG, [f"output={tmp_path}"], head)


@pytest.mark.parametrize(
    ("environment", "what"),
    [
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}, "3 node"),
        ({"RAY_AUTH_MODE": "token"}, "wants a token, and this process has none. Ray looks for the token in"),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64},
            "refuses the token of this process. Ray looks for the token in",
        ),
    ],
    ids=["token", "no token", "wrong token"],
)
def test_joining_a_cluster_needs_its_token(started: Started, tmp_path: Path, environment: dict[str, str], what: str):
    assert what in join(started.address, HOME=str(tmp_path), **environment)


def test_joining_a_cluster_of_another_version(started: Started):
    changed = "import ray; ray.__version__ = '1.0.0'" + JOIN
    told = join(started.address, changed, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    assert "Ray: 1.0.0" in told
    assert "Install the cluster's versions" in told


@pytest.mark.usefixtures("token")
def test_the_doctor_asks_every_node(started: Started):
    told = join(
        started.address,
        EXAMINE,
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN=TOKEN,
        PYTHONPATH=os.pathsep.join(map(str, PATHS)),
    )
    assert "ok 3 nodes with hfedmoe_ray" in told
    assert "ok the run directory is shared by 3 nodes and writable" in told
    assert "ok the clients of quickstart fit, 2 at once" in told
    assert told.count("the object store of node") == 3
    assert _job_server(started.url).level == "ok"


def join(address: str, program: str = JOIN, **environment: str) -> str:
    """What `connected` says in a process of its own: Ray reads the token once per process."""
    impatient = {"RAY_NUM_REDIS_GET_RETRIES": "2"}
    done = subprocess.run(
        [sys.executable, "-c", program, address],
        env=os.environ | impatient | environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("address", ["127.0.0.1:9", "http://127.0.0.1:9"])
def test_a_job_server_that_does_not_answer(address: str, tmp_path: Path):
    with pytest.raises(ClusterError, match=r"No Ray job server answers at http://127.0.0.1:9"):
        submit(CONFIG, [f"output={tmp_path}"], address)


def test_an_address_that_is_none(tmp_path: Path):
    with pytest.raises(ClusterError, match="write the URL"):
        submit(CONFIG, [f"output={tmp_path}"], "ray://127.0.0.1:10001")


def test_the_runtime_environment_for_jobs_submitted_by_hand_is_one_ray_accepts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)
    written = yaml.safe_load((REPOSITORY / "jobs" / "runtime_env.yaml").read_text())
    environment = RuntimeEnv(**written)
    assert {".venv", "runs", ".git"} <= set(environment["excludes"])
    assert (REPOSITORY / "jobs" / "federate.py").is_file()
