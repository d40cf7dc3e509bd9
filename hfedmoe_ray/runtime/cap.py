"""A client's memory as a hard limit on a CPU: an allocation beyond it fails in the client, and harms nobody else.

RLIMIT_DATA bounds what a process has mapped for writing and to itself. The frozen weights, the data and the object
store are mapped to be read or to be shared and are not charged, as in `train.memory.private_bytes`. But it counts
what was asked for, touched or not, such as the stacks of threads. So the limit is not the budget itself: it is what
is mapped when a task begins, what the process may still write, and a leeway. No allocation within the budget fails;
what is beyond fails once it has used up the leeway and the gaps that earlier tasks left in the heap.
"""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STATUS = Path("/proc/self/status")
_LEEWAY = 128 * 2**20
"""What a task maps and does not write: the stacks of the threads it starts first of all, 8 MiB each (measured: 76 MiB
in an actor's first training task, less in later ones)."""


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
    kib = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    mapped, written = (int(kib[name].split()[0]) * 1024 for name in ("VmData", "RssAnon"))
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
