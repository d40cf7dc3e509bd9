"""What strategies add to a round crosses to other processes: a run on Ray ends with the model of a run in this one.

What every strategy does is compared in tests/ray/test_session.py and tests/chaos. Here are those with something of
their own to send: private routers and signals; merged and quantised experts, probes and profiles taken while the server
reduces; a top-k, a load balance and learned scales; a pull to the start, rules and an optimizer in the server.
"""

from pathlib import Path
from typing import Any

import pytest
from tiny_federation import SLOWISH, Recorder, experiment, on_devices, run

from hfedmoe_ray.runtime.pool import RayExecutor

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

CASES: dict[str, dict[str, Any]] = {
    "flex_moe": {"strategy": "flex_moe"},
    "flux": {"strategy": "flux"},
    "fft_moe": {"strategy": {"name": "fft_moe", "balance": 0.1}},
    "flame": {"strategy": "flame"},
    "fedprox": {
        "strategy": "fedprox",
        "server": {"optimizer": "fedadam"},
        "rules": {"experts": "frequency", "routers": "rows"},
        "evaluate": {"personalised": True},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_on_ray_ends_with_the_model_of_a_run_in_this_process(sources: Path, tmp_path: Path, case: str) -> None:
    made = experiment(sources, "mixtral", **CASES[case])
    _, here, expected = run(made, tmp_path / "here")
    _, there, found = run(made, tmp_path / "there", where=RayExecutor)
    for key in ("model_sha256", "accuracy", "own_accuracy_by_client", "bytes_up", "bytes_down", "clients"):
        assert there[key] == here[key], key
    assert measured(found) == measured(expected)
    assert here["clients"]["ok"] > 0


def measured(recorder: Recorder) -> list[tuple[int, float | None, float | None, float | None]]:
    """What was found in each round, in the order in which it was told."""
    return [(one.round, one.accuracy, one.test_loss, one.own_accuracy) for one in recorder.rounds]


def test_rounds_are_evaluated_beside_the_next_behind_its_tasks_and_to_the_same_result(
    sources: Path, tmp_path: Path
) -> None:
    runs = {}
    for overlap in (True, False):
        made = experiment(sources, "mixtral", evaluate={"own": "always", "overlap": overlap})
        _, summary, recorder = run(made, tmp_path / str(overlap), where=RayExecutor)
        began = [(f["kind"], f["round"]) for name, f in recorder.events if name == "task_started"]
        runs[overlap] = summary["model_sha256"], measured(recorder)
        for round in (0, 1):
            trained = [number for number, what in enumerate(began) if what == ("train", round + 1)]
            evaluated = [number for number, what in enumerate(began) if what == ("evaluate", round)]
            assert trained[-1] < evaluated[0] if overlap else evaluated[-1] < trained[0]
    assert runs[True] == runs[False]


def test_an_asynchronous_run_does_not_depend_on_who_is_really_done_first(sources: Path, tmp_path: Path) -> None:
    """Stopped in the middle, gone on with here, and with tasks of several versions at work at once there."""
    options = {"in_flight": 3, "buffer": 2}
    made = on_devices(sources, SLOWISH, "mixtral", rounds=5, asynchronous=options)
    _, here, expected = run(made, tmp_path / "here")
    _, first, began = run(made, tmp_path / "there", where=RayExecutor, stop_after=3)
    assert first["status"] == "stopped"
    _, there, rest = run(made, tmp_path / "there", resume=True)
    for key in ("model_sha256", "accuracy", "bytes_up", "bytes_down", "simulated_seconds", "clients"):
        assert there[key] == here[key], key
    told = [[(r.client, r.staleness) for r in report.clients] for report in (*began.rounds, *rest.rounds)]
    assert told == [[(r.client, r.staleness) for r in report.clients] for report in expected.rounds]
    assert any(staleness for records in told for _, staleness in records)
