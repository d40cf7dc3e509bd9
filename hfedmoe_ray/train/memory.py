"""What a client's process really occupies, and giving back what it no longer needs.

A process's own memory is what it has written: anonymous pages, which cannot be shared, nor read again from a file.
Mapped weights, data and cached states are not in it: the page cache holds them once for all processes of a node, and
drops them when it must. Torch-free, but for what is asked of a GPU.
"""

import ctypes
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil

if TYPE_CHECKING:
    import torch

_STATM = Path("/proc/self/statm")
_SAMPLE_S = 0.002
"""Between two readings of a peak. One takes 2 microseconds: the kernel counts; smaps would walk the page tables."""
MIB = 2**20


def private_bytes() -> int:
    """Returns this process's own memory in bytes: its anonymous pages; elsewhere than on Linux its unique set size."""
    if _STATM.exists():
        _, resident, backed, *_ = _STATM.read_text().split()
        return (int(resident) - int(backed)) * os.sysconf("SC_PAGE_SIZE")
    return int(psutil.Process().memory_full_info().uss)


class PeakMemory:
    """Watches the peak of a client's own memory during a block; on a GPU, that of its allocator on the device."""

    def __init__(self, device: "torch.device") -> None:
        """Takes note of where the client computes."""
        self._device = device
        self._peak = 0
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> Self:
        """Starts watching."""
        if self._device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stops watching; `mib` stays."""
        if self._device.type == "cuda":
            import torch

            self._peak = torch.cuda.max_memory_reserved(self._device)
        else:
            self._over.set()
            self._watcher.join()

    @property
    def mib(self) -> float:
        """The peak in MiB, once the block is left. On a GPU what the driver keeps for the process is not in it."""
        return self._peak / MIB

    def _watch(self) -> None:
        while True:
            self._peak = max(self._peak, private_bytes())
            if self._over.wait(_SAMPLE_S):
                self._peak = max(self._peak, private_bytes())
                return


def return_freed_memory() -> None:
    """Gives freed memory back to the system, where the C library can: an idle client should hold its base alone.

    Weights, gradients and activations are allocated and freed in many sizes; without this the heap keeps the largest
    it ever was.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
