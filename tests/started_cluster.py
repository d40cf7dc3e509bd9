"""A cluster of `ray start` processes here, as on three machines: an empty head, the server's node, a client node."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ray.util.state import StateApiClient
from ray.util.state.common import ListApiOptions, NodeState, StateResource
from ray.util.state.exception import RayStateApiException

GIVEN_UP_AFTER = 90
"""Seconds for all nodes to be there."""
WORKERS = {
    "server": ["--num-cpus=0", "--labels=hfedmoe-role=server"],
    "client": ["--num-cpus=2", "--labels=hfedmoe-role=client"],
}
"""Options by role, as in the files that `hfedmoe cluster render` writes."""


@dataclass(frozen=True)
class Started:
    """Where the cluster is reached."""

    url: str
    """Of its job server."""
    address: str
    headers: Mapping[str, str]
    """With the token."""
    directory: Path
    """Where the nodes write."""

    def list(self, resource: StateResource) -> list[NodeState]:
        """What there is of a kind, dead things included."""
        client = StateApiClient(self.url, headers=dict(self.headers))
        options = ListApiOptions(timeout=10, detail=True)
        return client.list(resource, options, raise_on_missing_output=False)


@contextmanager
def started_cluster(directory: str, environment: dict[str, str], token: str) -> Iterator[Started]:
    """Starts the nodes, each as a process of its own, and ends exactly those.

    Args:
        directory: Where they write; its path is short.
        environment: Of the nodes, and so of the jobs.
        token: Asked of everyone.
    """
    port, dashboard, agent, client = free_ports(4)
    host = socket.gethostbyname(socket.gethostname())
    address = f"{host}:{port}"
    head = ["--head", f"--port={port}", f"--node-ip-address={host}", f"--temp-dir={directory}", "--num-cpus=0"]
    # Ray's agent for jobs has one fixed port unless it is told another, which any Ray of this machine may hold.
    head += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    head += [f"--ray-client-server-port={client}", "--labels=hfedmoe-role=head"]
    found = Started(f"http://127.0.0.1:{dashboard}", address, {"Authorization": f"Bearer {token}"}, Path(directory))
    with ExitStack() as nodes:
        joining = [
            [f"--address={address}", "--dashboard-agent-listen-port=0", *options] for options in WORKERS.values()
        ]
        # One after another: nodes that start at once on one machine choose the same names for their sockets.
        for number, options in enumerate([head, *joining], start=1):
            nodes.enter_context(_node(options, directory, environment))
            _wait_for_nodes(found, number)
        yield found


@contextmanager
def _node(options: Sequence[str], directory: str, environment: dict[str, str]) -> Iterator[None]:
    shared = ["--block", "--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0"]
    command = [
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        *shared,
        f"--object-store-memory={2**28}",
        *options,
    ]
    log = Path(directory, f"{len(list(Path(directory).glob('*.log')))}.log")
    with log.open("w") as out:
        at_once = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
        process = subprocess.Popen(command, env=environment | at_once, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield
    finally:
        process.terminate()  # which ends the node's processes, and no others
        process.wait(60)


def _wait_for_nodes(cluster: Started, number: int) -> None:
    until = time.monotonic() + GIVEN_UP_AFTER
    while True:
        try:
            there = len(cluster.list(StateResource.NODES))
        except RayStateApiException:  # the dashboard starts with the head
            there = 0
        if there == number:
            return
        assert time.monotonic() < until, f"{there} of {number} nodes are there"
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listened at a moment ago."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]
