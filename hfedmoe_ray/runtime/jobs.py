"""Sending a run to a Ray cluster as a job, following it, and bringing its record home.

What is uploaded is this package, `jobs/federate.py` and the resolved configuration: a megabyte, whatever lies beside
them. The cluster's own Python environment is used; nothing is installed there.
"""

import asyncio
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

import hfedmoe_ray
from hfedmoe_ray.config.load import dump_experiment, load_experiment
from hfedmoe_ray.config.plugins import plugin_source
from hfedmoe_ray.errors import ClusterError, ConfigError
from hfedmoe_ray.runtime import timeouts
from hfedmoe_ray.runtime.archive import Receiver
from hfedmoe_ray.runtime.cluster import TOKEN_ADVICE, first_line

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
PACKAGE = Path(hfedmoe_ray.__file__).parent
RECONNECTS = 5
"""Times a broken log connection is opened again."""


def submit(
    config: Path,
    overrides: Sequence[str],
    address: str | None,
    *,
    follow: bool = True,
    overwrite: bool = False,
    python: str = "python",
    show: Callable[[str], object] = sys.stdout.write,
) -> int:
    """Submits `hfedmoe run CONFIG OVERRIDES` to a cluster and returns the job's exit code (0 if not followed).

    The run directory is `output`/`name` on the cluster, below the home directory there unless `output` is absolute.
    A followed job that succeeds sends its record (metrics, summary, report; no checkpoints), which is written to
    `output`/`name` here.

    Args:
        config: Configuration file; read, resolved and checked here.
        overrides: key=value.
        address: URL of the cluster's job server (its dashboard). Default: $RAY_API_SERVER_ADDRESS, else this machine.
        follow: Show the log until the job ends.
        overwrite: Delete an earlier run of the same name, there and here.
        python: The cluster's interpreter.
        show: Is given the log, piece by piece.

    Raises:
        ConfigError: the configuration is wrong, the run exists here already, or this is not a checkout.
        ClusterError: the cluster cannot be reached or refuses the token.
        KeyboardInterrupt: Ctrl-C while following; the job goes on.
    """
    experiment = load_experiment(config, overrides)
    target = Path(experiment.output) / experiment.name
    if follow and target.exists() and not overwrite:
        raise ConfigError(
            f"{target} exists already, and the record of this run would be written there. Choose another name "
            "(name=…), or have it deleted first (--overwrite)."
        )
    if overwrite and (target / "config.yaml").is_file():
        shutil.rmtree(target)
    client = _connect(address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS)
    with tempfile.TemporaryDirectory(prefix="hfedmoe-job-") as upload:
        fill_upload(Path(upload), dump_experiment(experiment), plugin_source(experiment.strategy.name))
        options = ["--send-files"] * follow + ["--overwrite"] * overwrite
        entrypoint = " ".join([python, "-u", "jobs/federate.py", *options, "config.yaml"])
        job = _submit_job(client, entrypoint, upload, experiment.name)
    if not follow:
        show(f"submitted {job}; follow it with: ray job logs {job} --follow\n")
        return 0
    receiver = Receiver()
    try:
        asyncio.run(_follow(client, job, lambda piece: show(receiver.feed(piece))))
    except KeyboardInterrupt:
        show(f"\nnot followed any more; the job goes on. To end it: ray job stop {job}\n")
        raise
    show(receiver.flush())
    info = client.get_job_info(job)
    if info.status != "SUCCEEDED":
        show(f"{info.message}\n")
        return info.driver_exit_code or 1
    if (target / "summary.json").is_file():
        show(f"the run is in {target}, which the cluster shares\n")
        return 0
    files = receiver.write(target)
    show(f"received {', '.join(sorted(file.name for file in files))} in {target}\n")
    return 0


def _submit_job(client: JobSubmissionClient, entrypoint: str, upload: str, run: str) -> str:
    """Hands the job over; a cluster that has just been started is given time until it takes jobs."""
    until = time.monotonic() + timeouts.JOB_AGENT
    while True:
        try:
            job: str = client.submit_job(
                entrypoint=entrypoint, runtime_env={"working_dir": upload}, metadata={"run": run}
            )
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > until:
                raise ClusterError(
                    f"The cluster takes no job: after {timeouts.JOB_AGENT:g} s no node has an agent for jobs running. "
                    "Ray must be installed as ray[default] on its nodes; their dashboard_agent.log says more."
                ) from error
            time.sleep(1.0)
        else:
            return job


def fill_upload(directory: Path, config: str, plugin: Path | None = None) -> None:
    """Puts what the job needs into an empty directory.

    Args:
        directory: Where.
        config: The resolved configuration.
        plugin: The module or package of the user's strategy, if it is not installed.

    Raises:
        ConfigError: the package was installed without its checkout, so that there is no `jobs/federate.py`.
    """
    entry = PACKAGE.parent / "jobs" / "federate.py"
    if not entry.is_file():
        raise ConfigError(
            f"{entry} is missing: `hfedmoe submit` uploads the checkout it runs from. Run it from a clone of the "
            "repository (pip install --editable)."
        )
    shutil.copytree(PACKAGE, directory / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    (directory / "jobs").mkdir()
    shutil.copy(entry, directory / "jobs")
    if plugin is not None and plugin.is_dir():
        shutil.copytree(plugin, directory / plugin.name, ignore=shutil.ignore_patterns("__pycache__"))
    elif plugin is not None:
        shutil.copy(plugin, directory)
    (directory / "config.yaml").write_text(config, encoding="utf-8")


def auth_headers() -> dict[str, str]:
    """The header that carries the cluster's token, from where Ray itself looks for it; empty where there is none."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not token and file.is_file():
        token = file.read_text(encoding="utf-8")
    return {"Authorization": f"Bearer {token.strip()}"} if token.strip() else {}


def _connect(address: str) -> JobSubmissionClient:
    """Opens a job server by its URL."""
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ClusterError(
            f"{address} is not the address of a job server; write the URL of the cluster's dashboard, such as "
            f"{DEFAULT_ADDRESS}."
        )
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=timeouts.CONNECT).close()
        return JobSubmissionClient(url, headers=auth_headers())
    except AuthenticationError as error:
        had = "refused the token that was sent" if auth_headers() else "wants a token, and none was found here"
        raise ClusterError(f"The cluster at {url} {had} ({first_line(error)}) {TOKEN_ADVICE}") from error
    except (OSError, RuntimeError) as error:
        raise ClusterError(
            f"No Ray job server answers at {url}: {first_line(error)} The dashboard must run on the head node (`ray "
            "start --head --dashboard-host=0.0.0.0`, with ray[default]) and its port be reachable from here, for "
            "example through `ssh -L 8265:localhost:8265 HEAD`."
        ) from error


async def _follow(client: Any, job: str, show: Callable[[str], object]) -> None:
    """Shows a job's log until the job has ended, across broken connections."""
    shown, problem = 0, "the log ended before the job"
    for _ in range(RECONNECTS):
        position = 0
        try:
            async for piece in client.tail_job_logs(job):
                fresh = piece[max(0, shown - position) :]
                position += len(piece)
                if fresh:
                    show(fresh)
                    shown = position
        except (RuntimeError, aiohttp.ClientError, OSError) as error:
            problem = first_line(error)
        if client.get_job_status(job).is_terminal():
            return
    raise ClusterError(f"The log of {job} cannot be followed: {problem} The job goes on: ray job logs {job} --follow")
