"""TensorBoard, MLflow and trackers of one's own: all numbers arrive once, and none of them can disturb a run."""

import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import wandb
import wandb_file
from recorded_run import CONFIG, EXPERTS, LAYERS, ROUNDS, facts, round_report, summary, tell_round, tell_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hfedmoe_ray.cli import main
from hfedmoe_ray.config.running import MLflow, Tracking, Wandb
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.records import NodeUsage, RoundReport
from hfedmoe_ray.tracking import aside, destinations, pictures
from hfedmoe_ray.tracking.files import FileTracker
from hfedmoe_ray.tracking.scalars import RoundScalars
from hfedmoe_ray.tracking.tracker import Tracker, Trackers

REPOSITORY = Path(__file__).parents[2]
OWN = """
class Lines:
    def __init__(self, run_dir):
        self.path = run_dir / "lines.txt"
    def start(self, config, facts):
        self.write("start")
    def event(self, name, fields):
        pass
    def round(self, report):
        self.write(f"round {report.round}")
    def finish(self, summary):
        self.write("finish")
    def write(self, text):
        with self.path.open("a") as stream:
            stream.write(text + "\\n")

class Half:
    def start(self, config, facts):
        pass
    def finish(self, summary):
        pass
"""


def trackers(run_dir: Path, tracking: Tracking, warn: Callable[[str], None]) -> Trackers:
    """The files, and what is asked for."""
    experiment = Experiment.model_validate(CONFIG | {"tracking": tracking.model_dump()})
    asked = destinations.destinations(experiment, run_dir, save_model=Path.mkdir, warn=warn)
    return Trackers([FileTracker(run_dir), *asked])


def tell(tracker: Tracker, rounds: range, resumed_from: int | None, *, finish: bool) -> None:
    tracker.start(CONFIG, facts(resumed_from=resumed_from))
    for number in rounds:
        tell_round(tracker, round_report(number))
    if finish:
        tracker.finish(summary())


def wait_for(path: Path, end: str) -> None:
    """Until another thread has written the file as far as that."""
    until = time.monotonic() + 30
    while not (path.is_file() and path.read_text().endswith(end)):
        assert time.monotonic() < until, path
        time.sleep(0.01)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_tracker.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "own_tracker", raising=False)


@pytest.mark.usefixtures("own")
def test_a_run_that_was_killed_and_resumed_is_everywhere_once(tmp_path: Path):
    """Rounds 4 and 5 were told before the kill and are computed again; MLflow joins only with the resumption."""
    run_dir, warnings = tmp_path / "run", list[str]()
    first = Tracking(wandb=Wandb(mode="offline"), tensorboard=True, others=("own_tracker:Lines",))
    killed = trackers(run_dir, first, warnings.append)
    tell(killed, range(6), None, finish=False)
    wait_for(run_dir / "tensorboard" / "rounds-told", "5\n")
    wait_for(run_dir / "lines.txt", "round 5\n")
    wandb.teardown()  # as its process is gone with the one that was killed

    store = (tmp_path / "mlruns").as_uri()
    both = first.model_copy(update={"mlflow": MLflow(uri=store, experiment="tests")})
    tell(trackers(run_dir, both, warnings.append), range(4, ROUNDS + 1), 3, finish=True)
    assert not warnings
    every = list(range(ROUNDS + 1))
    accuracies = [round_report(number).accuracy for number in every]

    board = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    told = board.Scalars("global/accuracy")
    assert [one.step for one in told] == every
    assert [one.value for one in told] == pytest.approx(accuracies)
    assert "custom_scalars__config__" in board.Tags()["tensors"]

    from mlflow import MlflowClient

    client = MlflowClient(store)
    identity = (run_dir / "mlflow" / "run-id").read_text().strip()
    history = sorted(client.get_metric_history(identity, "global/accuracy"), key=lambda metric: metric.step)
    assert [(one.step, one.value) for one in history] == list(zip(every, accuracies, strict=True))
    run = client.get_run(identity)
    assert (run.info.run_name, run.info.status) == ("quickstart", "FINISHED")
    assert run.data.params["clients.count"] == str(CONFIG["clients"]["count"])
    assert run.data.tags["version.torch"]
    assert {file.path for file in client.list_artifacts(identity)} >= {"config.yaml", "summary.json"}

    # Its process being killed, the first log may lack the last rounds: the second has all, and is the only one sent.
    (log,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    assert [line["round"] for line in wandb_file.history(log)] == every
    assert [line["_step"] for line in wandb_file.history(log)] == every
    totals = {line["round"]: line["traffic/total_mib"] for line in wandb_file.history(log)}
    bytes_to = [sum(round_report(n).bytes_up + round_report(n).bytes_down for n in range(last + 1)) for last in every]
    assert [totals[number] for number in every] == pytest.approx([count / 2**20 for count in bytes_to])

    lines = (run_dir / "lines.txt").read_text().splitlines()
    assert lines[:7] == ["start", *(f"round {number}" for number in range(6))]
    assert lines[7:] == ["start", *(f"round {number}" for number in range(4, ROUNDS + 1)), "finish"]


class Broken:
    """Waits for ever in round 1, or raises there."""

    def __init__(self, go_on: threading.Event | None) -> None:
        self.go_on = go_on
        self.rounds: list[int] = []

    def start(self, _config: Mapping[str, Any], _facts: Mapping[str, Any]) -> None:
        pass

    def event(self, _name: str, _fields: Mapping[str, Any]) -> None:
        pass

    def round(self, report: RoundReport) -> None:
        self.rounds.append(report.round)
        if report.round == 1 and self.go_on is None:
            raise OSError("no space left\non http://me:password@there:9/disk")
        if report.round == 1 and self.go_on:
            self.go_on.wait()

    def finish(self, _summary: Mapping[str, Any]) -> None:
        self.rounds.append(-1)


@pytest.mark.parametrize("hangs", [True, False])
def test_a_destination_that_hangs_or_fails_is_told_of_once(hangs: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(aside, "FINISH_TIMEOUT_S", 0.3)
    go_on, warnings, threads = threading.Event(), list[str](), list[threading.Thread]()

    def warn(message: str) -> None:
        warnings.append(message)
        threads.append(threading.current_thread())

    broken = Broken(go_on if hangs else None)
    started = time.monotonic()
    tell_run(aside.Aside(broken, "Elsewhere", warn=warn))
    assert time.monotonic() - started < 5
    (warning,) = warnings
    assert threads == [threading.main_thread()]
    expected = "was not done 0 s after the end" if hangs else "OSError: no space left on http://***@there:9/disk"
    assert expected in warning
    assert "Elsewhere" in warning
    go_on.set()
    assert broken.rounds[:2] == [0, 1]
    assert hangs or broken.rounds == [0, 1], "after a failure it is left alone"


def test_what_is_not_installed_or_not_said_is_refused_with_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quickstart: Path, tmp_path: Path
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    command = ["run", str(quickstart), f"output={tmp_path}", "backend=local"]
    monkeypatch.setattr(destinations, "find_spec", lambda name: name == "mlflow")
    assert main([*command, "tracking.tensorboard=true"]) == 2
    assert "pip install tensorboard" in capsys.readouterr().err
    assert main([*command, "tracking.mlflow={}"]) == 2
    assert "MLFLOW_TRACKING_URI" in capsys.readouterr().err
    assert main([*command, "tracking.mlflow.uri=sqlite:///runs.db"]) == 2
    assert "pip install mlflow " in capsys.readouterr().err
    monkeypatch.setattr(destinations, "find_spec", lambda _: None)
    assert main([*command, "tracking.mlflow.uri=http://localhost:5000"]) == 2
    assert "pip install mlflow-skinny" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing was begun"


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own_tracker:Half", "lacks event, round"),
        ("own_tracker:Liens", r"no class Liens \(classes in it: Lines, Half\)"),
        ("elsewhere:Lines", "there is no module elsewhere"),
    ],
)
def test_a_class_that_is_no_tracker_is_refused(name: str, said: str):
    with pytest.raises(ConfigError, match=said):
        destinations.check_destinations(Tracking(others=(name,)))


def test_panels_show_numbers_that_are_logged(tmp_path: Path):
    """Those of docs/wandb_panels.py, which needs a package that is not installed here, and of the sweep."""
    report = RoundReport(
        **{
            **{field: getattr(round_report(2), field) for field in round_report(2).__dataclass_fields__},
            "simulated_seconds": 3.0,
            "own_accuracy": 0.5,
            "nodes": (
                NodeUsage(node=0, name="a", cpu_percent=12.5, memory_percent=50.0),
                NodeUsage(
                    node=1,
                    name="b",
                    cpu_percent=1.0,
                    memory_percent=2.0,
                    gpu_percent=(90.0,),
                    gpu_memory_percent=(7.0,),
                ),
            ),
        }
    )
    names = RoundScalars(tmp_path, (), None).of(report)
    assert (names["node/0/cpu"], names["node/1/gpu0"], names["node/1/gpu0_memory"]) == (12.5, 90.0, 7.0)
    text = (REPOSITORY / "docs" / "wandb_panels.py").read_text()
    shown = set(re.findall(r'"((?:global|own|train|traffic|experts|clients|seconds)/\w+)"', text))
    assert shown >= {"global/accuracy", "traffic/total_mib"}
    assert shown - names.keys() == {"experts/heatmap"}, "a picture"
    for pattern in re.findall(r'metric_regex="([^"]+)"', text):
        assert any(re.fullmatch(pattern, name) for name in names), pattern
    assert "metric: {name: global/accuracy, goal: maximize}" in (REPOSITORY / "configs" / "sweep.yaml").read_text()


def test_pictures_are_bounded_in_number_and_size(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pictures, "MOST", 3)
    few = pictures.Pictures(ROUNDS, facts()["clients"])
    assert [number for number in range(ROUNDS + 1) if few.of(round_report(number))] == [0, 3, 6, 8]
    monkeypatch.setattr(pictures, "ROWS", 4)
    monkeypatch.setattr(pictures, "CELLS", LAYERS * EXPERTS - 1)
    shown = few.of(round_report(3))
    assert shown.keys() == {"experts/selection", "clients/budgets"}
    assert 7 in [row[0] for row in shown["clients/budgets"].data], "who was late is shown before others"
    counts = sorted(count for layer in round_report(3).selected for count in layer)
    assert sorted(row[2] for row in shown["experts/selection"].data) == counts[-4:]
