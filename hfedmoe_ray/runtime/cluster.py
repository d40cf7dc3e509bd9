"""Connecting to Ray: a private cluster on this machine, or one that is already running.

A private cluster has its own directory, no dashboard nor any other process that it can do without (`daemons`), and
ends with the process that started it. Ray opens its ports on every interface of the machine whatever it is told; what
keeps others out is its token, which Ray makes and requires by default (`RAY_AUTH_MODE`).
"""

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import AuthenticationError

from hfedmoe_ray.errors import ClusterError
from hfedmoe_ray.packing import NodeCapacity
from hfedmoe_ray.runtime import timeouts
from hfedmoe_ray.runtime.daemons import SYSTEM_CONFIG, none_to_spare
from hfedmoe_ray.runtime.machine import object_store_bytes, this_machine

_ROOT, _PREFIX = Path("/tmp"), "hfedmoe-ray-"
"""Where private clusters keep their files. Not in $TMPDIR: a socket's path, which lies below, must be short."""
TOKEN_ADVICE = (
    "Ray looks for the token in RAY_AUTH_TOKEN, then in the file named by RAY_AUTH_TOKEN_PATH, then in "
    "~/.ray/auth_token. Copy the one of the cluster's head node (there: `ray get-auth-token`) to one of these places "
    "and set RAY_AUTH_MODE=token."
)


@contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connects this process to Ray and disconnects it again; a private cluster is shut down and its files removed.

    Args:
        address: "auto", host:port of a cluster this machine is a node of, or None for a private cluster.

    Raises:
        ClusterError: with what to do, where the cluster cannot be joined.
    """
    if ray.is_initialized():
        raise ClusterError(
            "This process is connected to Ray already. Disconnect it (ray.shutdown()) before starting a run."
        )
    directory = None if address else _start_private()
    if address:
        _join(address)
    try:
        yield
    finally:
        ray.shutdown()
        if directory:
            shutil.rmtree(directory, ignore_errors=True)


def gcs_address() -> str:
    """Where other processes of this machine join the cluster this one is connected to, as host:port."""
    return str(ray.get_runtime_context().gcs_address)


def capacity() -> tuple[NodeCapacity, ...]:
    """What every live node of the cluster offers, by node id, whatever is in use at the moment."""
    nodes = [_capacity(node) for node in ray.nodes() if node["Alive"]]
    return tuple(sorted(nodes, key=lambda node: node.node))


def _capacity(node: Mapping[str, Any]) -> NodeCapacity:
    offered = node["Resources"]
    return NodeCapacity(
        node=node["NodeID"],
        name=node["NodeManagerAddress"],
        cpus=offered.get("CPU", 0.0),
        gpus=int(offered.get("GPU", 0)),
        memory_bytes=int(offered.get("memory", 0)),
        labels=node.get("Labels", {}),
    )


def _start_private() -> Path:
    """Starts a cluster of this machine alone and returns its directory."""
    machine = this_machine()
    _sweep()
    directory = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_ROOT))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with none_to_spare():
            ray.init(
                address="local",
                num_cpus=int(machine.cpus),
                object_store_memory=object_store_bytes(),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _memory=machine.memory_bytes,
                _temp_dir=str(directory),
                _system_config=SYSTEM_CONFIG,
            )
    except Exception as error:
        shutil.rmtree(directory, ignore_errors=True)
        raise ClusterError(
            f"Ray could not start on this machine: {error}. Try `backend=local`, which needs no Ray, or see "
            "`hfedmoe doctor`."
        ) from error
    return directory


def _sweep() -> None:
    """Removes what private clusters left whose process was killed."""
    for directory in _ROOT.glob(f"{_PREFIX}*"):
        pid = directory.name.removeprefix(_PREFIX).partition("-")[0]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)) and directory.stat().st_uid == os.getuid():
            shutil.rmtree(directory, ignore_errors=True)


def _join(address: str) -> None:
    """Joins a running cluster."""
    if address.startswith(("ray://", "http://", "https://")):
        raise ClusterError(
            f"runtime.address is {address}, which is not an address to join: a run must live on a node of the "
            f"cluster. From outside it, send the run there: hfedmoe submit CONFIG --address http://HEAD:8265"
        )
    if address != "auto":
        _check_port(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except AuthenticationError as error:
        raise ClusterError(
            f"The Ray cluster at {address} wants a token, and this process has none. {TOKEN_ADVICE}"
        ) from error
    except (ConnectionError, TimeoutError, ValueError) as error:
        if address == "auto":
            raise ClusterError(
                "runtime.address is auto, and no Ray cluster runs on this machine. Start one (`ray start --head`), or "
                "leave runtime.address out for a private cluster."
            ) from error
        # Ray tells only its log, above this message, whether it was the token.
        raise ClusterError(
            f"{address} answers, but cannot be joined: either it is not the port of a Ray head node, or it refuses the "
            f"token of this process. {TOKEN_ADVICE}"
        ) from error
    except RuntimeError as error:
        advice = (
            "Install the cluster's versions of Ray and Python here (or the other way round)."
            if "Version mismatch" in str(error)
            else f"Is this machine a node of that cluster? {TOKEN_ADVICE}"
        )
        raise ClusterError(f"The Ray cluster at {address} cannot be joined: {error} {advice}") from error


def _check_port(address: str) -> None:
    """Refuses at once what Ray would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        raise ClusterError(f"runtime.address is {address}; write auto, or host:port such as 10.0.0.1:6379.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeouts.CONNECT).close()
    except OSError as error:
        raise ClusterError(
            f"Nothing answers at runtime.address {address}: {error}. Is the head node up (`ray status` there), and "
            "the port open? For a private cluster on this machine leave runtime.address out."
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, as a sentence."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return f"{text}."
