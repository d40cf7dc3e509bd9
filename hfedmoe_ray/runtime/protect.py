"""Arrays in the object store, seen through pages that cannot be written.

Ray maps its store writable into every process of a node; that an array out of it refuses writes is a flag of NumPy,
which torch does not look at: `torch.from_numpy(array).add_(1)` changes the object for every client of the node, and
nobody notices. Here each array is mapped a second time, at an address of its own, from the same physical pages and
without permission to write. Whoever writes to it all the same dies by a segmentation fault, alone, and is replaced like
any actor that died.

The second mapping is the kernel's own: mremap(2) with an old size of 0 duplicates a shared mapping. So nothing about
Ray's has to change, pages that an array has in common with others are no difficulty, and nothing needs restoring. It
costs two system calls an array.
"""

import ctypes
import errno
import mmap
import os
import sys
import weakref
from collections.abc import Mapping
from functools import cache

import numpy as np

from hfedmoe_ray.runtime.overlay import view
from hfedmoe_ray.types import Array

_MAYMOVE = 1
_FAILED = ctypes.c_void_p(-1).value


def protected(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the same arrays, in the same memory, such that no process can change them through what is returned.

    Small objects do not lie in shared memory but are copied into the process by Ray; those are returned as views that
    refuse writes, and so is everything where the system is not Linux.

    Raises:
        OSError: The kernel refuses another mapping (a process may have vm.max_map_count of them).
    """
    return {name: _protected(array) for name, array in arrays.items()}


def _protected(array: Array) -> Array:
    contiguous = array.flags.c_contiguous or array.flags.f_contiguous
    if not sys.platform.startswith("linux") or not contiguous or not array.nbytes:
        return view(array)
    offset = array.ctypes.data % mmap.PAGESIZE
    length = offset + array.nbytes
    address = _duplicate(array.ctypes.data - offset, length)
    if address is None:
        return view(array)
    pages = (ctypes.c_char * length).from_address(address)
    # Ray keeps the object as long as `array` lives: until nobody looks through the second mapping any more.
    weakref.finalize(pages, _unmap, address, length, array).atexit = False
    seen = np.frombuffer(memoryview(pages), array.dtype, array.size, offset)
    return view(seen.reshape(array.shape, order="C" if array.flags.c_contiguous else "F"))


def _duplicate(start: int, length: int) -> int | None:
    """Address of a second, read-only mapping of some pages; None if they are this process's own and not shared."""
    libc = _libc()
    address: int | None = libc.mremap(start, 0, length, _MAYMOVE)
    if address == _FAILED or address is None:
        if ctypes.get_errno() == errno.EINVAL:
            return None
        raise _error("mremap")
    if libc.mprotect(address, length, mmap.PROT_READ):
        raise _error("mprotect")
    return address


def _unmap(address: int, length: int, _kept: Array) -> None:
    if _libc().munmap(address, length):
        raise _error("munmap")


def _error(call: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{call} of published weights: {os.strerror(code)}")


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mremap.restype = ctypes.c_void_p
    libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc
