"""Asking every node of the cluster this process is connected to what it is, and what it sees of a directory."""

import platform
import shutil
import uuid
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hfedmoe_ray import __version__
from hfedmoe_ray.diagnosis import NodeReport
from hfedmoe_ray.runtime import timeouts
from hfedmoe_ray.runtime.cluster import first_line


def survey(directory: Path) -> list[NodeReport]:
    """Returns a report of every live node.

    Args:
        directory: A file is made in it for a moment, here and on every node, to see whether it is shared; it is made
            itself, and removed again, where it does not exist here.
    """
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f".hfedmoe-doctor-{uuid.uuid4().hex}"
    probe.touch()
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        look = ray.remote(num_cpus=0, max_retries=0)(_look)
        asked = [
            look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                str(probe)
            )
            for node in nodes
        ]
        return [_report(node, one) for node, one in zip(nodes, asked, strict=True)]
    finally:
        probe.unlink(missing_ok=True)
        if made and not any(directory.iterdir()):
            directory.rmdir()


def _report(node: dict[str, Any], asked: Any) -> NodeReport:
    """One node's answer, or why there is none."""
    name = node["NodeManagerAddress"]
    try:
        told = ray.get(asked, timeout=timeouts.SURVEY)
    except RayError as error:
        cause = getattr(error, "cause", None) or error
        return NodeReport(name=name, error=first_line(cause))
    return NodeReport(name=name, store_bytes=int(node["Resources"].get("object_store_memory", 0)), **told)


def _look(probe: str) -> dict[str, Any]:
    """On a node: plain values, which need no class of ours to be read."""
    shm, own = Path("/dev/shm"), Path(f"{probe}-{uuid.uuid4().hex}")
    try:
        own.touch(exist_ok=False)
        own.unlink()
        writes = True
    except OSError:
        writes = False
    return {
        "python": platform.python_version(),
        "package": __version__,
        "shm_bytes": shutil.disk_usage(shm).total if shm.is_dir() else 0,
        "sees": Path(probe).exists(),
        "writes": writes,
    }
