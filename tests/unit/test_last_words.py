"""What a process leaves when native code ends it close to the limit of its memory."""

import subprocess
import sys
from pathlib import Path

import pytest

from hfedmoe_ray.runtime.cap import _mark

FILL = """
import ctypes, os, sys
from hfedmoe_ray.runtime import cap
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
with cap.marked(sys.argv[1], budget := int(sys.argv[2])), cap.capped(budget):
    taken = 0
    while taken < int(sys.argv[3]) and (piece := libc.malloc(2**18)) is not None:
        ctypes.memset(piece, 1, 2**18)
        taken += 2**18
    os._exit(9)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory exist on Linux only")
@pytest.mark.parametrize(("takes", "left"), [(2**40, True), (2**20, False)])
def test_a_process_that_fills_its_memory_as_fast_as_it_can_leaves_a_mark_before_it_dies(takes: int, left: bool):
    mark: Path = _mark(f"test-{takes}")
    mark.unlink(missing_ok=True)
    try:
        command = [sys.executable, "-c", FILL, f"test-{takes}", str(256 * 2**20), str(takes)]
        assert subprocess.run(command, check=False, timeout=60).returncode == 9
        assert mark.exists() == left
    finally:
        mark.unlink(missing_ok=True)
