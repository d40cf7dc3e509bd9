"""Processes that a benchmark starts: what memory they use with all below them, and how all of them are ended."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_S = 1.0
GONE_S = 30.0
"""How long killed processes may take to be gone."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    code: int | None
    """None: it had not ended in time, and was killed."""
    seconds: float
    peak_mib: float
    """The most memory that it and all below it had at once."""


def run_to_end(command: Sequence[str], environment: Mapping[str, str], log: Path, limit_s: float) -> Ended:
    """Runs a command; whatever becomes of it, nothing that it has started is left.

    Args:
        command: The program and its arguments.
        environment: Variables on top of this process's.
        log: Is given what it prints.
        limit_s: Seconds after which it is killed.
    """
    process = start(command, environment, log)
    started = time.monotonic()
    try:
        with peak_of_tree(process.pid) as peak:
            code = wait(process, limit_s)
        return Ended(code=code, seconds=time.monotonic() - started, peak_mib=peak[0])
    finally:
        end_family(process)


def start(command: Sequence[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Starts a command in a session of its own, by which `end_family` finds what it has started."""
    with log.open("ab") as file:
        return subprocess.Popen(command, env=os.environ | environment, stdout=file, stderr=file, start_new_session=True)


def wait(process: subprocess.Popen[bytes], limit_s: float) -> int | None:
    """Waits for a process's end; returns its exit code, None where that takes longer."""
    try:
        return process.wait(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return None


def end_family(process: subprocess.Popen[bytes]) -> None:
    """Kills a process that `start` has started, all below it, and all others in its session."""
    family = {one.pid: one for one in psutil.process_iter() if _session(one.pid) == process.pid}
    if process.poll() is None:
        family |= {one.pid: one for one in psutil.Process(process.pid).children(recursive=True)}
    for one in family.values():
        try:
            one.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue  # it has ended since it was listed
    process.wait(timeout=GONE_S)
    psutil.wait_procs([one for pid, one in family.items() if pid != process.pid], timeout=GONE_S)


def _session(pid: int) -> int | None:
    """The session of a process; None once it has ended."""
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


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
