"""Evaluating a round while the next one trains changes when it is told and nothing else, whatever happens meanwhile."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_federation import HFEDMOE, Elsewhere, Recorder, experiment, run

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.context import RunContext
from hfedmoe_ray.errors import TrainingError
from hfedmoe_ray.records import RoundReport
from hfedmoe_ray.runtime.worker import Worker, client_worker
from hfedmoe_ray.tracking.files import FileTracker
from hfedmoe_ray.tracking.jsonl import plain
from hfedmoe_ray.tracking.record import read_run

TIMES = {"seconds", "step_seconds", "peak_mib", "phases", "nodes", "clients"}
"""What no two runs have alike; clients are compared by themselves."""


class Killed(BaseException):
    """Ends the server where it stands."""


class Files(Recorder):
    """Keeps the record of a run in files too, until the server is killed."""

    def __init__(self, run_dir: Path, killed_at: tuple[str, int] | None = None) -> None:
        super().__init__()
        self._files = FileTracker(run_dir)
        self._killed_at = killed_at

    def start(self, config: Any, facts: Any) -> None:
        super().start(config, facts)
        self._files.start(config, facts)

    def event(self, name: str, fields: Any) -> None:
        super().event(name, fields)
        self._files.event(name, fields)
        if name == "task_finished" and (fields["kind"], fields["round"]) == self._killed_at:
            raise Killed

    def round(self, report: RoundReport) -> None:
        super().round(report)
        self._files.round(report)
        if ("round", report.round) == self._killed_at:
            raise Killed


def made(sources: Path, **changes: Any) -> Experiment:
    return experiment(sources, "mixtral", rounds=3, **{"evaluate": {"own": "always", "personalised": True}, **changes})


def told(rounds: Any) -> list[dict[str, Any]]:
    """Round by round what is told, its clients included, but for how long it took and how busy machines were."""
    return [
        {name: value for name, value in plain(report).items() if name not in TIMES}
        | {"clients": [{n: v for n, v in plain(c).items() if n not in TIMES} for c in report.clients]}
        for report in rounds
    ]


@pytest.fixture(scope="module")
def whole(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary and reports of a run that evaluates at once."""
    _, summary, recorder = run(made(sources), tmp_path_factory.mktemp("whole"))
    assert all(report.accuracy is not None and report.own_accuracy is not None for report in recorder.rounds)
    return summary, told(recorder.rounds)


def same(summary: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether two runs came to the same."""
    seen = ("wall_seconds", "peak_client_mib", "memory")
    return all(summary[key] == value for key, value in expected.items() if key not in seen)


@pytest.mark.parametrize("overlap", [True, False])
def test_the_same_is_told_in_the_same_order(sources: Path, tmp_path: Path, whole: Any, overlap: bool):
    evaluate = {"own": "always", "personalised": True, "overlap": overlap}
    _, summary, recorder = run(made(sources, evaluate=evaluate), tmp_path / "run", where=Elsewhere)
    assert same(summary, whole[0])
    assert told(recorder.rounds) == whole[1]
    memory = {tier: (one["predicted_mib"], one["seen_mib"] > 0) for tier, one in summary["memory"].items()}
    assert memory == {tier: (predicted, True) for tier, predicted in recorder.facts["predicted_mib"].items()}
    assert memory.keys() == {"phone", "server"}
    alone = [one["predicted_mib"] for one in whole[0]["memory"].values()]
    assert alone == [None, None], "nothing was predicted of a process that is the server's too"
    evaluating = [f for name, f in recorder.events if name == "task_started" and f["kind"] == "evaluate"]
    assert [one["round"] for one in evaluating] == sorted(one["round"] for one in evaluating)
    first_training = recorder.events.index(("round_started", {"round": 2, "cohort": 4}))
    assert (recorder.events.index(("task_started", evaluating[12 * 2 - 1])) > first_training) == overlap


def test_with_profiles_taken_ahead_the_same_is_told_too(sources: Path, tmp_path: Path):
    """There the tasks of three things meet: training, profiling for the next round, evaluation of the last."""
    both = [
        run(made(sources, strategy="flux", evaluate={"overlap": overlap}), tmp_path / str(overlap), where=Elsewhere)
        for overlap in (True, False)
    ]
    assert same(both[0][1], both[1][1])
    assert told(both[0][2].rounds) == told(both[1][2].rounds)


@pytest.mark.parametrize("killed_at", [("evaluate", 1), ("train", 2), ("round", 1), ("round", 2), ("evaluate", 3)])
def test_a_killed_server_leaves_no_round_out_and_tells_none_twice(
    sources: Path, tmp_path: Path, whole: Any, killed_at: tuple[str, int]
):
    """Amid the evaluation, amid the training beside it, and between the report of a round and the next checkpoint."""
    with pytest.raises(Killed):
        run(made(sources), tmp_path, where=Elsewhere, recorder=Files(tmp_path, killed_at))
    _, summary, _ = run(made(sources), tmp_path, where=Elsewhere, resume=True, recorder=Files(tmp_path))
    assert same(summary, whole[0])
    assert [json.loads(line)["round"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]
    assert told(read_run(tmp_path).rounds) == whole[1]
    clients = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    once = [(one["round"], one["client"]) for one in clients if one["event"] == "client"]
    assert len(once) == len(set(once))


def test_a_run_that_is_stopped_has_told_all_and_goes_on_to_the_same(sources: Path, tmp_path: Path, whole: Any):
    _, stopped, first = run(made(sources), tmp_path, where=Elsewhere, stop_after=0)
    assert stopped["status"] == "stopped"
    assert told(first.rounds) == whole[1][: stopped["rounds"] + 1]
    assert stopped["accuracy"] == first.rounds[-1].accuracy
    # Here, where nothing overlaps: what is due is due all the same.
    _, summary, rest = run(made(sources), tmp_path, resume=True)
    assert same(summary, whole[0])
    assert told(rest.rounds) == whole[1][stopped["rounds"] :]


def test_an_evaluation_that_fails_ends_the_run_and_is_made_up_for(sources: Path, tmp_path: Path, whole: Any):
    class Broken:
        def __init__(self, context: RunContext) -> None:
            self._worker: Worker = client_worker(context)

        def execute(self, task: Any, *rest: Any) -> Any:
            if (task.kind, task.round, task.part[0]) == ("evaluate", 1, 3):
                raise OSError("the disk is gone")
            return self._worker.execute(task, *rest)

    with pytest.raises(TrainingError, match=r"round 1: evaluation of slice 4/8 .*the disk is gone.*hfedmoe resume"):
        run(made(sources), tmp_path, where=lambda context: Elsewhere(context, worker_factory=Broken))
    _, summary, rest = run(made(sources), tmp_path, where=Elsewhere, resume=True)
    assert same(summary, whole[0])
    assert told(rest.rounds) == whole[1][1:]


def test_where_nothing_is_evaluated_a_round_is_told_at_once(sources: Path, tmp_path: Path):
    evaluate = {"own": "never", "every": 2}
    _, _, recorder = run(
        made(sources, strategy=HFEDMOE, evaluate=evaluate), tmp_path / "run", where=Elsewhere, stop_after=1
    )
    assert [(report.round, report.accuracy is not None) for report in recorder.rounds] == [(0, True), (1, False)]
