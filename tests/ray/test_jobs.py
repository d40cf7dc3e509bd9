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

import pytest
import yaml
from ray.job_submission import JobSubmissionClient
from ray.runtime_env import RuntimeEnv
from small_run import CONFIG, OVERRIDES, REPOSITORY

from hfedmoe_ray.errors import ClusterError, ConfigError
from hfedmoe_ray.runtime.jobs import auth_headers, submit

pytestmark = pytest.mark.ray
TOKEN = "0123456789abcdef" * 4
# Ray's agent for jobs listens on one fixed port, which another Ray of the machine, or one just killed, may hold; only
# `ray start` has an option for it. It also notes where it listens: without that a job joins any Ray it finds.
HEAD = """
import functools, ray, socket, sys
from ray._private import parameter, utils
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
parameter.RayParams = functools.partial(parameter.RayParams, dashboard_agent_listen_port=port)
head = ray.init(address="local", num_cpus=2, object_store_memory=2**28, include_dashboard=True, _temp_dir=sys.argv[1])
utils.write_ray_address(head.address_info["gcs_address"], sys.argv[1])
print("http://" + head.dashboard_url, head.address_info["gcs_address"], flush=True)
sys.stdin.read()
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
def started(home: Path) -> Iterator[tuple[str, str]]:
    """(URL of the job server, address) of a head with another home directory than ours; it ends when its input does."""
    session = tempfile.mkdtemp(prefix="hfedmoe-test-", dir="/tmp")
    environment = os.environ | {"HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD, session],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=REPOSITORY,
    )
    assert process.stdout is not None
    url, address = next(line for line in process.stdout if line.startswith("http")).split()
    yield url, address
    process.communicate("", timeout=60)
    shutil.rmtree(session, ignore_errors=True)


@pytest.fixture
def head(started: tuple[str, str]) -> str:
    return started[0]


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


@pytest.mark.usefixtures("token")
def test_a_submitted_run_succeeds_and_its_record_comes_home(
    head: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    log: list[str] = []
    code = submit(
        CONFIG, [*OVERRIDES, "rounds=1", "runtime.slots=1", "name=job"], head, python=sys.executable, show=log.append
    )
    text = "".join(log)
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
    with pytest.raises(ConfigError, match=r"job exists already.*--overwrite"):
        submit(CONFIG, [*OVERRIDES, "name=job"], head)


@pytest.mark.usefixtures("token")
def test_a_failed_job_has_its_exit_code_and_its_paragraph(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    log: list[str] = []
    overrides = [*OVERRIDES, "name=broken", "data.source=/nowhere/missing.jsonl"]
    assert submit(CONFIG, overrides, head, python=sys.executable, show=log.append) == 3
    assert "/nowhere/missing.jsonl" in "".join(log)
    assert not (tmp_path / "runs" / "broken").exists()


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
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}, "1 node"),
        ({"RAY_AUTH_MODE": "token"}, "wants a token, and this process has none. Ray looks for the token in"),
        (
            {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64},
            "refuses the token of this process. Ray looks for the token in",
        ),
    ],
    ids=["token", "no token", "wrong token"],
)
def test_joining_a_cluster_needs_its_token(
    started: tuple[str, str], tmp_path: Path, environment: dict[str, str], what: str
):
    assert what in join(started[1], HOME=str(tmp_path), **environment)


def test_joining_a_cluster_of_another_version(started: tuple[str, str]):
    changed = "import ray; ray.__version__ = '1.0.0'" + JOIN
    told = join(started[1], changed, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN)
    assert "Ray: 1.0.0" in told
    assert "Install the cluster's versions" in told


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
