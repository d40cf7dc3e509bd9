"""What the process of a client is started with. Torch-free."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_CLIENT = "HFEDMOE_CLIENT_PROCESS"
ENVIRONMENT = {
    # This process serves clients and nobody else.
    _CLIENT: "1",
    # One thread per client: they share the cores, and a result's last bits depend on the number of threads.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # One heap for all threads, and blocks from 4 MiB on outside it, in huge pages where the kernel has them. Left to
    # itself, glibc raises that bound to 32 MiB, and a heap of small and large blocks falls to pieces: the quickstart's
    # clients with half the experts peaked at 510 MiB in their first round and at 630 in the fifth; with this at about
    # 475 in all. Once the bound is set, the heap is cut short whenever 128 KiB are free at its end, many times a step,
    # and every page fetched anew; at 16 MiB that is rare.
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(4 * 2**20),
    "MALLOC_TRIM_THRESHOLD_": str(16 * 2**20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Environment variables, which torch and the C library read when a process starts."""


@contextmanager
def inherited() -> Iterator[None]:
    """Processes that are started in this block get `ENVIRONMENT`; afterwards this one has its own again."""
    before = dict(os.environ)
    os.environ.update(ENVIRONMENT)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def quick_imports() -> Iterator[None]:
    """Imports in this block make no garbage, and are done without the collector, which would look for it all the time.

    What a client's process imports takes 3.7 seconds of a core instead of 4.5.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def absent(*modules: str) -> Iterator[None]:
    """Nothing that is imported in this block takes these modules along, unless somebody has imported them before."""
    # None is Python's own sign that there is no such module.
    hidden: dict[str, Any] = dict.fromkeys(name for name in modules if name not in sys.modules)
    sys.modules.update(hidden)
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


UNUSED = ("accelerate", "mlflow", "pandas", "pyarrow", "scipy", "sklearn")
"""What transformers and DeepSpeed import where it is installed, and a client never calls: 88 MiB of each process."""


@contextmanager
def lean_imports() -> Iterator[None]:
    """Imports in this block are `quick_imports`, and in a client's process they find nothing of `UNUSED` installed.

    Afterwards it is there again, but transformers, which asks once what is installed, keeps to what it was told: so
    no other process is treated so, nor one in which somebody, such as a plugin, has imported transformers before.
    """
    lean = _CLIENT in os.environ and "transformers" not in sys.modules
    with quick_imports(), absent(*(UNUSED if lean else ())):
        yield
