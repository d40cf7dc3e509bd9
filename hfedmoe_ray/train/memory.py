"""What a client's process really occupies, and giving back what it no longer needs."""

import ctypes
from pathlib import Path

import psutil

_ROLLUP = Path("/proc/self/smaps_rollup")


def private_mib() -> float:
    """Returns the memory in MiB that this process alone has written: it cannot be shared, nor read again from a file.

    On Linux the private dirty pages. Mapped weights and data are not in it: the page cache holds them once for all
    processes of a node. Elsewhere the unique set size.
    """
    if _ROLLUP.exists():
        for line in _ROLLUP.read_text().splitlines():
            if line.startswith("Private_Dirty:"):
                return int(line.split()[1]) / 1024
    return float(psutil.Process().memory_full_info().uss) / 2**20


def return_freed_memory() -> None:
    """Gives freed memory back to the system, where the C library can: between tasks a slot should hold its base alone.

    Activations are allocated and freed in many sizes; without this the heap keeps the largest it ever was.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
