"""A client's memory as a limit on a CPU: an allocation beyond it fails in the client, and harms nobody else.

RLIMIT_DATA bounds what a process has mapped for writing and to itself. The frozen weights, the data and the object
store are mapped to be read or to be shared and are not charged, as in `train.memory.private_bytes`. But it counts
what was asked for, touched or not, such as the stacks of threads. So the limit is not the budget itself: it is what
is mapped when a task begins, what the process may still write, and a leeway. No allocation within the budget fails;
what is beyond fails once it has used up the leeway and the gaps that earlier tasks left in the heap.

Native code may end the process where an allocation fails, and a node without a swap its kernel. Then nothing is left
to say why, so a process leaves a mark, a file on its node, while it is close to the limit. A message to Ray would take
longer than a fast process takes from there to its end.
"""

import resource
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hfedmoe_ray.runtime import timeouts
from hfedmoe_ray.train.memory import MIB, private_bytes

_STATUS = Path("/proc/self/status")
_LEEWAY = 128 * MIB
"""What a task maps and does not write: the stacks of the threads it starts first of all, 8 MiB each (measured: 76 MiB
in an actor's first training task, less in later ones)."""
_CLOSE, _CLOSE_BYTES = 0.15, 64 * MIB
"""A process that dies with less than this share of budget and leeway left, or these bytes, is taken to have died of
it."""
_WRITES = 8 * 2**30
"""Bytes a second that a process is taken to write at most: from how far away it looks at the limit again."""
_SAMPLE_S = 0.002
"""The least time between two looks. Each interrupts what is being computed; far from the limit they are rare."""


@contextmanager
def capped(budget: int) -> Iterator[None]:
    """Makes allocations in the block fail that would take the process's own memory beyond the budget, in bytes.

    Elsewhere than on Linux, nothing is limited. Afterwards Ray's own threads can allocate again what they need.

    Raises:
        MemoryError: The process is beyond it already.
    """
    if not _STATUS.exists():
        yield
        return
    mapped, written = _own_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    room = budget - written + _LEEWAY
    if room < 0:
        raise MemoryError(f"the idle process alone occupies {written >> 20} MiB")
    limit = mapped + room
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


@contextmanager
def marked(actor: str, budget: int) -> Iterator[None]:
    """Leaves a mark once this actor's own memory comes close to its limit in the block; takes it away if it survives.

    Args:
        actor: The actor's id.
        budget: Of `capped`, in bytes.
    """
    if not _STATUS.exists():
        yield
        return
    over = threading.Event()
    total = budget + _LEEWAY
    close = total - max(_CLOSE * total, _CLOSE_BYTES)

    def watch() -> None:
        while (left := close - private_bytes()) > 0:
            if over.wait(max(left / _WRITES, _SAMPLE_S)):
                return
        _mark(actor).touch()

    watcher = threading.Thread(target=watch, name="close-to-limit", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        _mark(actor).unlink(missing_ok=True)


def died_of_memory(actor: str, node: str) -> bool:
    """Whether an actor that has died was close to its limit.

    Of one that died with its node nobody knows, nor where the node does not answer in time: that is like any death.
    """
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    try:
        return bool(ray.get(_was_marked.options(scheduling_strategy=there).remote(actor), timeout=timeouts.LAST_WORDS))
    except RayError:
        return False


@ray.remote(num_cpus=0, max_retries=0)  # type: ignore[untyped-decorator,unused-ignore]
def _was_marked(actor: str) -> bool:
    """On the actor's node: whether it left a mark, which is taken away."""
    mark = _mark(actor)
    marked = mark.exists()
    mark.unlink(missing_ok=True)
    return marked


def _mark(actor: str) -> Path:
    return Path(tempfile.gettempdir()) / f"hfedmoe-close-to-limit-{actor}"


def _own_bytes() -> tuple[int, int]:
    """What RLIMIT_DATA counts, this process's private writable mappings; and what it has written, its own memory."""
    kib = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    mapped, written = (int(kib[name].split()[0]) * 1024 for name in ("VmData", "RssAnon"))
    return mapped, written
