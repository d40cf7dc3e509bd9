"""Asynchronous runs: the same however they are made, resumed to the same bits, and rounds where rounds are the same."""

import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
from tiny_federation import HFEDMOE, SLOWISH, experiment, final_weights, on_devices, run

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import TrainingError
from hfedmoe_ray.federation.checkpoint import load_checkpoint, run_identity
from hfedmoe_ray.federation.flight import Flight, flight_fields, read_flight
from hfedmoe_ray.runtime.local import LocalExecutor
from hfedmoe_ray.train import local as client_work
from hfedmoe_ray.types import ExpertPlan, LoadBalance, MergedExpert, Role

BUFFERED = {"in_flight": 3, "buffer": 2}


def buffered(sources: Path, options: dict[str, Any] | None = None, **changes: Any) -> Experiment:
    """Three of four clients at work, two updates averaged at once, four times."""
    chosen = BUFFERED if options is None else options
    return on_devices(sources, SLOWISH, asynchronous=chosen, **{"rounds": 4, **changes})


class Backwards(LocalExecutor):
    """Runs what it has in the opposite order."""

    def run(self, tasks, notify, further=tuple):
        ready = list(tasks)
        worker = self._worker_factory(self._context)
        while ready:
            yield self._execute(worker, ready.pop(), notify)
            ready = [*further(), *ready]


def test_what_ends_first_comes_first_on_the_simulated_clock(sources: Path, tmp_path: Path):
    """With a buffer of one, a task is started when a round begins and its update ends another round."""
    made = buffered(sources, {"in_flight": 3, "buffer": 1}, rounds=8)
    _, summary, recorder = run(made, tmp_path / "run")
    assert summary["rounds"] == 8
    assert summary["clients"]["ok"] == 4 + 8, "all are profiled, then one a round"
    clock = list(accumulate(report.simulated_seconds for report in recorder.rounds))
    assert clock == sorted(clock)
    started = {(f["round"], f["client"]) for name, f in recorder.events if name == "task_started"}
    stale = []
    for report in recorder.rounds[1:]:
        (record,) = report.clients
        begun = record.round - record.staleness
        assert (begun, record.client) in started
        assert clock[record.round] == pytest.approx(clock[begun - 1] + record.simulated_seconds)
        stale.append(record.staleness)
    assert min(stale) < max(stale), "some overtake others"


def test_everybody_at_once_is_a_round_to_the_last_bit(sources: Path, tmp_path: Path):
    """All clients at work and all averaged at once: nobody is ever stale, so the exponent does not matter."""
    options = {"in_flight": 4, "buffer": 4, "staleness": 3.0}
    context, summary, recorder = run(buffered(sources, options, rounds=3), tmp_path / "one")
    other, rounds, expected = run(on_devices(sources, rounds=3), tmp_path / "two")
    assert summary["model_sha256"] == rounds["model_sha256"]
    assert [report.selected for report in recorder.rounds] == [report.selected for report in expected.rounds]
    assert final_weights(context).version == final_weights(other).version


@pytest.mark.parametrize("strategy", [HFEDMOE, {"name": "fft_moe"}, {"name": "flame"}, {"name": "fedavg"}])
def test_neither_the_order_of_work_nor_an_interruption_changes_a_bit(
    sources: Path, tmp_path: Path, strategy: dict[str, Any]
):
    made = buffered(sources, strategy=strategy, server={"optimizer": "fedavgm"})
    _, whole, recorder = run(made, tmp_path / "whole")
    _, backwards, _ = run(made, tmp_path / "backwards", where=Backwards)
    context, stopped, _ = run(made, tmp_path / "cut", stop_after=2)
    assert stopped["status"] == "stopped"
    kept = load_checkpoint(context.run_dir / "checkpoints", run_identity(context))
    assert kept.flights
    assert set(kept.older) == {flight.version for flight in kept.flights} - {kept.weights.version}
    _, resumed, rest = run(made, tmp_path / "cut", resume=True)
    for key in ("model_sha256", "accuracy", "simulated_seconds", "bytes_up", "bytes_down", "clients"):
        assert backwards[key] == resumed[key] == whole[key], key
    assert [[(r.client, r.staleness, r.simulated_seconds) for r in report.clients] for report in rest.rounds] == [
        [(r.client, r.staleness, r.simulated_seconds) for r in report.clients] for report in recorder.rounds[3:]
    ]


def test_what_is_too_stale_is_dropped_and_another_takes_its_place(sources: Path, tmp_path: Path):
    _, summary, recorder = run(buffered(sources, BUFFERED | {"max_staleness": 0}, rounds=6), tmp_path / "run")
    dropped = [r for report in recorder.rounds for r in report.clients if r.status == "dropped"]
    assert len(dropped) == summary["clients"]["dropped"] > 0
    for record in dropped:
        assert record.staleness > 0
        assert "max_staleness is 0" in record.reason
    for report in recorder.rounds[1:]:
        assert sum(r.status == "ok" for r in report.clients) == 2
        assert all(r.staleness == 0 for r in report.clients if r.status == "ok")


def test_a_client_that_fails_makes_room_and_too_many_end_the_run(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    batches = client_work.ClientWorker._batches

    def broken(self, task, count):
        if task.client in failing:
            raise ZeroDivisionError(f"of client {task.client}")
        return batches(self, task, count)

    monkeypatch.setattr(client_work.ClientWorker, "_batches", broken)
    failing = {1}
    _, summary, recorder = run(buffered(sources), tmp_path / "one")
    assert summary["clients"]["failed"] > 0
    for report in recorder.rounds[1:]:
        assert sum(record.status == "ok" for record in report.clients) == 2
        assert {record.client for record in report.clients if record.status == "failed"} <= failing
    failing = {0, 1, 2}
    with pytest.raises(TrainingError, match=r"below `runtime.quorum`(?s:.*)client 1: failed \(ZeroDivisionError"):
        run(buffered(sources), tmp_path / "three")


def test_a_flight_is_written_and_read_back_as_it_was():
    plan = ExpertPlan(
        roles=((Role.TRAIN, Role.ABSENT, Role.ABSENT), (Role.FROZEN, Role.TRAIN, Role.TRAIN)),
        absent="merge",
        merged=(MergedExpert(layer=0, members=(1, 2), shares=(0.1, 0.9)),),
        batch_budget=2,
        scale=(0.1, 1.2),
        balance=LoadBalance(weight=0.1, rho=0.5, load=((0.2, 0.8),)),
    )
    flight = Flight(client=3, round=2, version=4, plan=plan, started=0.1, seconds=1 / 3)
    assert read_flight(json.loads(json.dumps(flight_fields(flight)))) == flight


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"asynchronous": {"in_flight": 5, "buffer": 2}}, "in_flight` is 5, but there are only 4"),
        ({"asynchronous": {"in_flight": 2, "buffer": 5}}, "buffer` is 5, but there are only 4"),
        ({"strategy": {"name": "local"}}, "averages nothing"),
        ({"strategy": {"name": "flux"}}, "profiles the clients of a round"),
        ({"strategy": {"name": "flex_moe"}}, "keeps routers private"),
        ({"rules": {"routers": "private"}}, "keeps routers private"),
    ],
)
def test_what_makes_no_sense_without_rounds_is_refused(sources: Path, changes: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        on_devices(sources, **{"asynchronous": BUFFERED, **changes})


def test_without_devices_there_is_no_order_of_arrival(sources: Path):
    with pytest.raises(ValueError, match="needs to know what devices clients have"):
        experiment(sources, asynchronous=BUFFERED)
