"""`hfedmoe evaluate`: finds what the run itself found, round by round, and measures other data with the same model."""

import hashlib
import json
import runpy
from pathlib import Path

import pytest
from tiny_federation import experiment

from hfedmoe_ray.cli import main
from hfedmoe_ray.errors import CheckpointError, ConfigError
from hfedmoe_ray.runtime import session


@pytest.fixture(scope="module")
def done(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("evaluate") / "run"
    made = experiment(sources, rounds=2, evaluate={"own": "always"}, tracking={"wandb": {"mode": "disabled"}})
    session.run(made, run_dir, resume=False, render=lambda *_: None)
    return run_dir


def contents(directory: Path) -> dict[Path, str]:
    files = [file for file in sorted(directory.rglob("*")) if file.is_file()]
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_every_kept_round_is_found_as_the_run_found_it(done: Path, capsys: pytest.CaptureFixture[str]):
    before = contents(done)
    for line in (done / "metrics.jsonl").read_text().splitlines():
        recorded = json.loads(line)
        assert main(["evaluate", str(done), "--round", str(recorded["round"]), "--own", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["round"], found["accuracy"], found["loss"]) == (
            recorded["round"],
            recorded["accuracy"],
            recorded["test_loss"],
        )
        assert sum(found["own"].values()) / len(found["own"]) == pytest.approx(recorded["own_accuracy"])
    assert main(["evaluate", str(done)]) == 0
    assert capsys.readouterr().out.startswith("round 2: test ")
    assert contents(done) == before, "nothing of the run is changed"


def test_other_data_are_measured_with_the_same_model(done: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", str(done), "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert main(["evaluate", str(done), "data.test_examples=5", "--json"]) == 0
    part = json.loads(capsys.readouterr().out)
    assert part["loss"] != whole["loss"]
    assert (5 * part["accuracy"]) == pytest.approx(round(5 * part["accuracy"])), "five examples"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--round", "7"], CheckpointError.exit_code, "round-0007"),
        (["strategy=random"], ConfigError.exit_code, "Only keys below `data`"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    done: Path, arguments: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["evaluate", str(done), *arguments]) == code
    assert says in capsys.readouterr().err


def test_a_job_evaluates_a_run_below_its_home(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("HOME", str(done.parent))
    job = runpy.run_path(str(Path(__file__).parents[2] / "jobs" / "evaluate.py"))
    assert job["main"](["run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["round"] == 2
