"""A cluster's job server, which its head node's dashboard is: reaching it with the token, its jobs, and its nodes."""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient
from ray.util.state import StateApiClient
from ray.util.state.common import ListApiOptions, StateResource
from ray.util.state.exception import RayStateApiException

from hfedmoe_ray.clusters.design import ROLE
from hfedmoe_ray.config.explain import closest
from hfedmoe_ray.errors import ClusterError
from hfedmoe_ray.runtime import timeouts
from hfedmoe_ray.runtime.cluster import TOKEN_ADVICE, first_line

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
RECONNECTS = 5
"""Times a broken log connection is opened again."""


@dataclass(frozen=True, kw_only=True)
class SubmittedRun:
    """A run that was submitted as a job."""

    job: str
    """Ray's name for the job."""
    run: str
    record: str
    """Where the run's record goes on the machine that submitted it."""
    status: str
    """PENDING, RUNNING, SUCCEEDED, STOPPED or FAILED."""
    message: str
    exit_code: int | None
    """Of a job that has ended, if it came so far."""
    started: float
    """When it was submitted, in seconds since 1970."""
    ended: float | None

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.status in ("SUCCEEDED", "STOPPED", "FAILED")


def connect(address: str | None) -> JobSubmissionClient:
    """Opens a job server.

    Args:
        address: Its URL. Default: $RAY_API_SERVER_ADDRESS, else this machine's.

    Raises:
        ClusterError: nothing answers there, or it refuses the token.
    """
    url = job_server_url(address)
    parts = urlsplit(url)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((str(parts.hostname), port), timeout=timeouts.CONNECT).close()
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


def job_server_url(address: str | None) -> str:
    """The URL that an address stands for.

    Raises:
        ClusterError: it is not one of a job server.
    """
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    url = address if "://" in address else f"http://{address}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ClusterError(
            f"{address} is not the address of a job server; write the URL of the cluster's dashboard, such as "
            f"{DEFAULT_ADDRESS}."
        )
    return url


def auth_headers() -> dict[str, str]:
    """The header that carries the cluster's token, from where Ray itself looks for it; empty where there is none."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not token and file.is_file():
        token = file.read_text(encoding="utf-8")
    return {"Authorization": f"Bearer {token.strip()}"} if token.strip() else {}


def place_of_driver(address: str | None) -> dict[str, str]:
    """Labels of the nodes that a run's driver, and with it the server, belongs on; none where only a head is there.

    The node that was made for it where there is one (`clusters.design`), else any but the head, which keeps Ray's books
    for everyone and should neither run rounds nor lose its memory to them.

    Raises:
        ClusterError: the cluster does not say which nodes it has.
    """
    client = StateApiClient(job_server_url(address), headers=auth_headers())
    options = ListApiOptions(timeout=int(timeouts.CONNECT), filters=[("state", "=", "ALIVE")])
    try:
        nodes = client.list(StateResource.NODES, options, raise_on_missing_output=False)
    except RayStateApiException as error:
        raise ClusterError(f"The cluster does not tell its nodes: {first_line(error)} Is its dashboard up?") from error
    if any(node["labels"].get(ROLE) == "server" for node in nodes):
        return {ROLE: "server"}
    heads = [node["node_id"] for node in nodes if node["is_head_node"]]
    return {"ray.io/node-id": f"!{heads[0]}"} if heads and len(nodes) > len(heads) else {}


def ray_version(client: JobSubmissionClient) -> str:
    """The version of Ray that the cluster runs.

    Raises:
        ClusterError: the answer is not that of a Ray dashboard.
    """
    answer = client._do_request("GET", "/api/version")
    if answer.status_code != 200 or "ray_version" not in answer.json():
        raise ClusterError(f"The cluster does not tell its version: {answer.status_code} {answer.text[:200]}")
    return str(answer.json()["ray_version"])


def submitted_runs(client: JobSubmissionClient) -> list[SubmittedRun]:
    """The cluster's jobs that `hfedmoe submit` made, the latest last."""
    found = [_submitted(job) for job in client.list_jobs() if job.metadata and "run" in job.metadata]
    return sorted(found, key=lambda one: one.started)


def find_run(client: JobSubmissionClient, wanted: str | None) -> SubmittedRun:
    """The latest submitted run of a name, or the one with this job's name; without any, the latest of all.

    Raises:
        ClusterError: there is none.
    """
    runs = submitted_runs(client)
    if wanted is not None:
        named = [one for one in runs if wanted in (one.run, one.job)]
        if not named:
            names = list(dict.fromkeys(one.run for one in runs))
            raise ClusterError(
                f"The cluster knows no submitted run {wanted}.{closest(wanted, names)} `hfedmoe status` lists them."
            )
        return named[-1]
    if not runs:
        raise ClusterError("No run was submitted to this cluster, or its head has been restarted since.")
    return runs[-1]


def stop(client: JobSubmissionClient, run: SubmittedRun) -> SubmittedRun:
    """Asks a job to end, waits until it has, and returns how it stands then.

    Raises:
        ClusterError: it does not end.
    """
    client.stop_job(run.job)
    until = time.monotonic() + timeouts.JOB_STOP
    while not (now := _submitted(client.get_job_info(run.job))).over:
        if time.monotonic() > until:
            raise ClusterError(
                f"{run.job} was asked to end {timeouts.JOB_STOP:g} s ago and is still {now.status.lower()}. Does its "
                "node answer (ray status)? Ray ends the job when the node is gone."
            )
        time.sleep(0.5)
    return now


def follow(client: JobSubmissionClient, job: str, show: Callable[[str], object]) -> None:
    """Shows a job's log until the job has ended, across broken connections.

    Raises:
        ClusterError: the connection breaks again and again; the job goes on.
    """
    asyncio.run(_follow(client, job, show))


async def _follow(client: Any, job: str, show: Callable[[str], object]) -> None:
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
    raise ClusterError(f"The log of {job} cannot be followed: {problem} The job goes on: hfedmoe logs {job}")


def told(runs: Sequence[SubmittedRun]) -> list[tuple[str, ...]]:
    """A row of text for each run: name, job, status, when it began, how long it took, what it says of its end."""
    rows: list[tuple[str, ...]] = []
    for one in runs:
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.started))
        seconds = (one.ended or time.time()) - one.started
        minutes = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
        rows.append((one.run, one.job, one.status.lower(), began, minutes, one.message if one.over else ""))
    return rows


def _submitted(job: Any) -> SubmittedRun:
    about = job.metadata or {}
    return SubmittedRun(
        job=job.submission_id,
        run=about.get("run", ""),
        record=about.get("record", ""),
        status=str(job.status.value),
        message=(job.message or "").strip(),
        exit_code=job.driver_exit_code,
        started=(job.start_time or 0) / 1000,
        ended=job.end_time / 1000 if job.end_time else None,
    )
