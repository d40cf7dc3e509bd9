"""What a client's process really occupies, and giving back what it no longer needs.

A process's own memory is what it has written: anonymous pages, which cannot be shared, nor read again from a file.
Mapped weights, data and cached states are not in it: the page cache holds them once for all processes of a node, and
drops them when it must. Torch-free, but for what is asked of a GPU.
"""

import ctypes
import os
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil

if TYPE_CHECKING:
    import torch

_STATM = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")
_CLEAR, _PEAK = Path("/proc/self/clear_refs"), "5"
"""Writing this there sets VmHWM back to what is resident now."""
MIB = 2**20


def private_bytes() -> int:
    """Returns this process's own memory in bytes: its anonymous pages; elsewhere than on Linux its unique set size."""
    if _STATM.exists():
        _, resident, backed, *_ = _STATM.read_text().split()
        return (int(resident) - int(backed)) * os.sysconf("SC_PAGE_SIZE")
    return int(psutil.Process().memory_full_info().uss)


class PeakMemory:
    """The peak of a client's own memory in a block; on a GPU, that of its allocator on the device.

    The kernel keeps it, so no thread has to watch, and interrupt what is being computed as often as it looks. What the
    kernel keeps is the peak of all that is resident, mapped files included. Those grow as states and weights are read,
    so `look` takes what they are now off the peak since the last look, and is wrong by what was mapped in between.
    Where the kernel cannot be told to forget, as elsewhere than on Linux, it is the peak since the process started.
    """

    def __init__(self, device: "torch.device") -> None:
        """Takes note of where the client computes."""
        self._device = device
        self._peak = 0

    def __enter__(self) -> Self:
        """Starts."""
        if self._device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _forget_peak()
        return self

    def __exit__(self, *exception: object) -> None:
        """Looks once more; `mib` stays."""
        self.look()

    def look(self) -> None:
        """Takes in what happened since the last look: once a step; it takes 60 microseconds."""
        if self._device.type == "cuda":
            import torch

            self._peak = torch.cuda.max_memory_reserved(self._device)
        else:
            self._peak = max(self._peak, _peak_bytes())
            _forget_peak()

    @property
    def mib(self) -> float:
        """The peak in MiB, once the block is left. On a GPU what the driver keeps for the process is not in it."""
        return self._peak / MIB


def _peak_bytes() -> int:
    """Peak of what is resident since it was last forgotten, less what is mapped from files now."""
    if not _CLEAR.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    kib = {name: int(value.split()[0]) for name, value in _fields() if name in ("VmHWM", "RssFile", "RssShmem")}
    return 1024 * (kib["VmHWM"] - kib["RssFile"] - kib["RssShmem"])


def _fields() -> Iterator[tuple[str, str]]:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        yield name, value


def _forget_peak() -> None:
    if _CLEAR.exists():
        _CLEAR.write_text(_PEAK)


class Spare:
    """Keeps freed memory while a process goes from task to task, and gives it back when it has been idle for a while.

    Pages that have been given back are cleared before they are had again: that took a tenth of a quickstart's steps.
    """

    def __init__(self, idle_s: float = 0.25) -> None:
        """Takes note of how many seconds of idleness are a while."""
        self._idle_s = idle_s
        self._timer: threading.Timer | None = None

    @contextmanager
    def working(self) -> Iterator[None]:
        """Nothing is given back within the block; a while after it everything is."""
        if self._timer is not None:
            self._timer.cancel()
        try:
            yield
        finally:
            self._timer = threading.Timer(self._idle_s, return_freed_memory)
            self._timer.daemon = True
            self._timer.start()


def return_freed_memory() -> None:
    """Gives freed memory back to the system, where the C library can: an idle client should hold its base alone.

    Weights, gradients and activations are allocated and freed in many sizes; without this the heap keeps the largest
    it ever was.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
