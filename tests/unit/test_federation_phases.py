"""Where a round's seconds go: each to one phase, and waiting begins where a slot has nothing left to do."""

import pytest

from hfedmoe_ray.federation import phases
from hfedmoe_ray.federation.phases import Phases, Waiting


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(phases.time, "perf_counter", lambda: now[0])
    return now


def seconds_waited(clock: list[float], clients: int, told: list[tuple[float, str, int]], end: float) -> float:
    waiting = Waiting(range(clients))
    for clock[0], event, client in told:
        waiting.note(event, client)
    clock[0] = end
    return waiting.seconds


def test_waiting_begins_when_a_slot_has_nothing_left(clock: list[float]) -> None:
    start, end = "task_started", "task_finished"
    two_slots = [(0, start, 0), (0, start, 1), (2, end, 0), (2, start, 2), (3, end, 1), (9, end, 2)]
    assert seconds_waited(clock, 3, two_slots, 9) == 6
    assert seconds_waited(clock, 3, two_slots[:4], 9) == 0, "both slots are at work"


def test_one_slot_waits_for_nobody_and_a_slot_for_each_for_all_but_the_first(clock: list[float]) -> None:
    one = [(n + late, event, n) for n in range(3) for event, late in (("task_started", 0.0), ("task_finished", 1.0))]
    assert seconds_waited(clock, 3, one, 3) == 0
    each = [(0, "task_started", n) for n in range(3)] + [(n + 1, "task_finished", n) for n in range(3)]
    assert seconds_waited(clock, 3, each, 3) == 2


def test_a_task_that_is_started_again_is_still_under_way(clock: list[float]) -> None:
    told = [(0, "task_started", 0), (0, "task_started", 1), (1, "task_retried", 1), (2, "task_started", 1)]
    assert seconds_waited(clock, 2, told, 4) == 0
    assert seconds_waited(clock, 2, [*told, (5, "task_finished", 0)], 8) == 3


def test_moving_seconds_keeps_their_sum(clock: list[float]) -> None:
    phase = Phases()
    with phase("train"):
        clock[0] = 7.0
    phase.move(2.0, of="train", to="wait")
    assert dict(phase.seconds) == {"train": 5.0, "wait": 2.0}
