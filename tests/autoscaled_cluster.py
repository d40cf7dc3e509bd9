"""A cluster of this machine that grows by itself: Ray's own autoscaler, for which a new node is a few more processes.

`ray.cluster_utils.AutoscalingCluster` does the same, but ends with `ray stop`, which ends every Ray on the machine.
Whatever is started here carries a variable of its own in its environment, and only that is ended.
"""

import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider

MARK = "HFEDMOE_TEST_CLUSTER"
"""Tells the processes of one such cluster from all others."""
GIVEN_UP_AFTER = 60
"""Seconds for the head node to start, and for everything to end."""


class NodesHere(FakeMultiNodeProvider):
    """Starts nodes on this machine. They offer its memory, whatever their type says: Ray's provider gives them none."""

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: Any, count: int, resources: Mapping[str, float], labels: Any
    ) -> None:
        """Starts so many nodes."""
        others = {name: amount for name, amount in resources.items() if name != "memory"}
        super().create_node_with_resources_and_labels(node_config, tags, count, others, labels)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listened at a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def processes(mark: str) -> list[psutil.Process]:
    """Every process of the cluster with this mark, whoever its parent is by now."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def end(mark: str) -> None:
    """Ends them all, those included that others of them start meanwhile."""
    until = time.monotonic() + GIVEN_UP_AFTER
    while left := processes(mark):
        if time.monotonic() > until:
            raise TimeoutError(f"still there: {left}")
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=5)


@contextmanager
def autoscaled(directory: Path, node_types: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A head node without CPUs whose autoscaler starts nodes of these types (see Ray's `available_node_types`).

    Args:
        directory: Where the cluster writes; its path is short (see the fixture `ray_directory`).
        node_types: By name: `resources`, `labels`, `max_workers`.

    Yields:
        The cluster's address.
    """
    mark, host = uuid.uuid4().hex, ray.util.get_node_ip_address()
    port, client_port, metrics_port = free_ports(3)
    address = f"{host}:{port}"
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    types = {name: {"node_config": {}, "min_workers": 0} | dict(one) for name, one in node_types.items()}
    config = {
        "cluster_name": "here",
        "max_workers": sum(one["max_workers"] for one in types.values()),
        "idle_timeout_minutes": 5,
        "provider": {
            "type": "external",
            "module": f"{NodesHere.__module__}.{NodesHere.__name__}",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {"ray.head.default": head} | types,
    }
    # Ray asks for these even where nothing is set up.
    config |= {"auth": {}, "file_mounts": {}, "cluster_synced_files": [], "initialization_commands": []}
    config |= {f"{who}setup_commands": [] for who in ("", "head_", "worker_")}
    config |= {f"{who}_start_ray_commands": [] for who in ("head", "worker")}
    (directory / "autoscaler.json").write_text(json.dumps(config))
    environment = os.environ | {
        MARK: mark,
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled"),  # as this process has it, which is to join
        "PYTHONUNBUFFERED": "1",
        "AUTOSCALER_METRIC_PORT": str(metrics_port),
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    command += [f"--temp-dir={directory}", f"--autoscaling-config={directory / 'autoscaler.json'}", "--num-cpus=0"]
    command += [f"--ray-client-server-port={client_port}", "--dashboard-agent-listen-port=0", "--disable-usage-stats"]
    command += ["--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={2**27}"]
    command += ["--include-dashboard=false"]
    with (directory / "head.log").open("w") as log:
        started = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_for_head(started, directory / "head.log")
        yield address
    finally:
        end(mark)
        started.wait(GIVEN_UP_AFTER)


def _wait_for_head(started: "subprocess.Popen[bytes]", log: Path) -> None:
    until = time.monotonic() + GIVEN_UP_AFTER
    while "Ray runtime started" not in log.read_text():
        if started.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"the head node did not start:\n{log.read_text()}")
        time.sleep(0.1)
