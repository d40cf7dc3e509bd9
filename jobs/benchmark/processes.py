"""Memory of a process and all below it, as the operating system counts it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

SAMPLE_S = 1.0


@contextmanager
def peak_of_tree(pid: int | None = None) -> Iterator[list[float]]:
    """Yields a list whose one entry is the most memory a process and all below it had at once, in MiB.

    Proportional set sizes: a page that several processes share counts once.

    Args:
        pid: The process at the top. Default: this one.
    """
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_S):
            peak[0] = max(peak[0], tree_mib(pid))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def tree_mib(pid: int | None = None) -> float:
    """Memory of a process (default: this one) and all below it in MiB; 0 once it has ended."""
    try:
        top = psutil.Process(pid)
        tree = (top, *top.children(recursive=True))
    except psutil.NoSuchProcess:
        return 0.0
    total = 0
    for process in tree:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue  # it has ended since it was listed
    return total / 2**20
