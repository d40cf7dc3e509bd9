"""What this machine offers to a private cluster, found without starting or importing Ray.

The numbers depend on the machine alone, not on what runs on it at the moment, so that `hfedmoe plan` and the run
that follows it see the same capacity.
"""

import os
from pathlib import Path

import psutil

from hfedmoe_ray.packing import GIB, NodeCapacity

STORE_SHARE, STORE_MOST = 0.2, 8 * GIB
"""Share of the memory given to the object store, and its upper bound: two versions of the trainable weights and a
round's updates lie there. (Above 10 GB Ray refuses a machine with a small /dev/shm instead of warning.)"""
SYSTEM_SHARE = 0.1
"""Share of the memory left to the operating system, Ray itself and the server."""


def this_machine() -> NodeCapacity:
    """CPUs this process may use, GPUs, and the memory left for clients."""
    memory = memory_bytes()
    return NodeCapacity(
        node="this machine",
        name="this machine",
        cpus=float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1),
        gpus=_gpus(),
        memory_bytes=int(memory * (1 - SYSTEM_SHARE)) - object_store_bytes(),
    )


def object_store_bytes() -> int:
    """Size of a private cluster's object store."""
    return min(int(memory_bytes() * STORE_SHARE), STORE_MOST)


def memory_bytes() -> int:
    """Memory of this machine, or of the container it is."""
    total = int(psutil.virtual_memory().total)
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        path = Path(limit)
        if path.is_file() and (text := path.read_text().strip()).isdecimal():
            total = min(total, int(text))
    return total


def _gpus() -> int:
    """NVIDIA devices this process may use; Ray counts for itself when it starts."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([one for one in visible.split(",") if one.strip() not in ("", "-1")])
    return len([one for one in Path("/dev").glob("nvidia[0-9]*") if one.name.removeprefix("nvidia").isdecimal()])
