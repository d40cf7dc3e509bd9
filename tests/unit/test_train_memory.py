"""What a process occupies: peaks are seen, freed memory goes back, and what is mapped from a file is nobody's own."""

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from small_run import small_experiment

from hfedmoe_ray.runtime.client import ClientActor
from hfedmoe_ray.train.environment import inherited
from hfedmoe_ray.train.memory import MIB, PeakMemory, Spare, private_bytes, return_freed_memory

SIZE = 64 * MIB


def written_and_freed() -> tuple[int, int]:
    """Bytes that a process has more to itself while `SIZE` is written, and after it was freed."""
    return_freed_memory()
    before = private_bytes()
    # Many pieces: one large block would go back to the system by itself.
    pieces = [np.ones(2**14) for _ in range(SIZE // (8 * 2**14))]
    written = private_bytes() - before
    del pieces
    return_freed_memory()
    return written, private_bytes() - before


def test_memory_that_was_written_counts_and_freed_memory_does_not():
    # In a process of its own: this one may have threads of earlier tests, with memory of theirs.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        written, freed = fresh.submit(written_and_freed).result()
    assert written > 0.9 * SIZE
    assert freed < 0.2 * SIZE


def kept_and_given_back() -> tuple[int, int, int]:
    """Bytes of `SIZE`, freed in a task, that are there after it, at the end of a longer next one, and when idle."""
    spare = Spare(idle_s=0.5)
    return_freed_memory()
    before = private_bytes()
    with spare.working():
        pieces = [np.ones(2**14) for _ in range(SIZE // (8 * 2**14))]
        last = np.ones(2**14)  # what is free behind the last block the C library gives back by itself
        del pieces
    after = private_bytes() - before
    with spare.working():
        time.sleep(1.0)
        still = private_bytes() - before
    until = time.monotonic() + 30.0
    while private_bytes() - before > 0.2 * SIZE and time.monotonic() < until:
        time.sleep(0.05)
    assert last.all()
    return after, still, private_bytes() - before


def test_freed_memory_is_kept_from_task_to_task_and_given_back_when_none_comes():
    with inherited(), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        after, still, idle = fresh.submit(kept_and_given_back).result()
    assert after > 0.9 * SIZE
    assert still > 0.9 * SIZE
    assert idle < 0.2 * SIZE


class Freeing(ClientActor):
    """Its task leaves `SIZE` bytes of gaps in the heap."""

    def _execute(self, task: Any, refs: Any) -> Any:
        del task, refs
        pieces = [np.ones(2**14) for _ in range(SIZE // (8 * 2**14))]
        last = np.ones(2**14)
        del pieces
        return last


def left_by_an_idle_actor() -> int:
    """Bytes of `SIZE` that an actor still has after a task, once it has been idle for long enough."""
    actor = Freeing(cast("Any", SimpleNamespace(experiment=small_experiment())), cast("Any", None), 0.0)
    return_freed_memory()
    before = private_bytes()
    last = actor.execute(cast("Any", None), cast("Any", None))
    until = time.monotonic() + 30.0
    while private_bytes() - before > 0.2 * SIZE and time.monotonic() < until:
        time.sleep(0.05)
    assert cast("Any", last).all()
    return private_bytes() - before


def test_a_client_s_actor_gives_back_what_its_tasks_have_freed():
    with inherited(), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        assert fresh.submit(left_by_an_idle_actor).result() < 0.2 * SIZE


def test_a_peak_between_two_readings_of_the_caller_is_seen():
    return_freed_memory()
    before = private_bytes()
    with PeakMemory(torch.device("cpu")) as peak:
        torch.ones(SIZE // 4).sum()
    assert 0.9 * SIZE < peak.mib * MIB - before < 1.5 * SIZE


def test_a_peak_before_a_look_is_kept_and_what_is_read_of_a_file_is_not_in_it(tmp_path: Path):
    states = np.lib.format.open_memmap(tmp_path / "states.npy", mode="w+", dtype=np.uint8, shape=(SIZE,))
    return_freed_memory()
    before = private_bytes()
    with PeakMemory(torch.device("cpu")) as peak:
        torch.ones(SIZE // 4).sum()
        peak.look()
        states[:] = 1
        peak.look()
    assert 0.9 * SIZE < peak.mib * MIB - before < 1.5 * SIZE


def test_a_file_that_is_mapped_and_even_written_is_not_the_process_own(tmp_path: Path):
    mapped = np.lib.format.open_memmap(tmp_path / "states.npy", mode="w+", dtype=np.uint8, shape=(SIZE,))
    before = private_bytes()
    mapped[:] = 1
    assert private_bytes() - before < 0.1 * SIZE
