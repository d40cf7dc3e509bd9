"""The frame of the command line: how every way to end becomes an exit code, and that no run is lost by mistake."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from hfedmoe_ray import errors
from hfedmoe_ray.cli import main
from hfedmoe_ray.errors import HFedMoEError, TrainingError
from hfedmoe_ray.runtime import session

COMMANDS = ("run", "resume", "plan", "validate", "doctor", "report", "export", "submit", "compare", "study", "bench")


@pytest.fixture
def output(tmp_path: Path) -> str:
    return f"output={tmp_path}"


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, bool]]:
    """Replaces training; holds (run directory, resumed) of every run that would have started."""
    started: list[tuple[Path, bool]] = []

    def run(_: object, run_dir: Path, *, resume: bool, **__: object) -> None:
        started.append((run_dir, resume))
        raise TrainingError("stopped by the test")

    monkeypatch.setattr(session, "run", run)
    return started


def a_run(directory: Path, quickstart: Path) -> Path:
    directory.mkdir()
    (directory / "config.yaml").write_text(quickstart.read_text())
    (directory / "precious").write_text("")
    return directory


def test_help_names_every_exit_code(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    codes = {
        kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HFedMoEError)
    }
    assert len(codes) == 9
    for code in codes | {0, 130}:
        assert f" {code}  " in text


def test_help_lists_the_commands_in_the_order_of_use(capsys: pytest.CaptureFixture[str]):
    main(["--help"])
    text = capsys.readouterr().out
    listed = [text.index(f"\n  {command} ") for command in COMMANDS]
    assert listed == sorted(listed)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]):
    assert main([command, "--help"]) == 0
    assert f"hfedmoe {command}" in capsys.readouterr().out


def test_wrong_usage_is_a_configuration_error(capsys: pytest.CaptureFixture[str]):
    assert main(["run"]) == 2
    assert main(["fly"]) == 2
    assert "fly" in capsys.readouterr().err


@pytest.mark.usefixtures("ran")
def test_an_error_is_one_paragraph_without_a_traceback(quickstart, output, capsys: pytest.CaptureFixture[str]):
    assert main(["run", str(quickstart), output]) == TrainingError.exit_code
    assert capsys.readouterr().err == "error: stopped by the test\n"


def test_a_bug_shows_its_traceback_and_says_so(
    monkeypatch: pytest.MonkeyPatch, quickstart: Path, output: str, capsys: pytest.CaptureFixture[str]
):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(session, "run", broken)
    assert main(["run", str(quickstart), output]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "ZeroDivisionError: by zero" in error
    assert "bug in hfedmoe" in error


@pytest.mark.parametrize("checkpoint", [True, False])
def test_ctrl_c_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
    quickstart: Path,
    tmp_path: Path,
    checkpoint: bool,
    capsys: pytest.CaptureFixture[str],
):
    def interrupted(_: object, run_dir: Path, **__: object) -> None:
        if checkpoint:
            (run_dir / "checkpoints").mkdir(parents=True)
            (run_dir / "checkpoints" / "LATEST").write_text("round-0001")
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "run", interrupted)
    assert main(["run", str(quickstart), f"output={tmp_path}"]) == 130
    error = capsys.readouterr().err
    assert error.startswith("interrupted: ")
    assert (f"hfedmoe resume {tmp_path / 'quickstart'}" in error) == checkpoint


def test_a_run_goes_to_the_directory_of_its_name(ran, quickstart: Path, tmp_path: Path):
    main(["run", str(quickstart), f"output={tmp_path}", "name=other"])
    assert ran == [(tmp_path / "other", False)]


def test_an_earlier_run_is_not_overwritten_by_mistake(
    ran, quickstart: Path, tmp_path: Path, output: str, capsys: pytest.CaptureFixture[str]
):
    earlier = a_run(tmp_path / "quickstart", quickstart)
    assert main(["run", str(quickstart), output]) == 2
    assert not ran
    assert (earlier / "precious").exists()
    message = capsys.readouterr().err
    for remedy in (f"hfedmoe resume {earlier}", "name=", "--overwrite"):
        assert remedy in message


def test_overwrite_removes_the_earlier_run(ran, quickstart: Path, tmp_path: Path, output: str):
    earlier = a_run(tmp_path / "quickstart", quickstart)
    main(["run", str(quickstart), output, "--overwrite"])
    assert ran
    assert not (earlier / "precious").exists()


def test_overwrite_never_removes_what_is_not_a_run(ran, quickstart: Path, tmp_path: Path, output: str):
    (tmp_path / "quickstart").mkdir()
    (tmp_path / "quickstart" / "precious").write_text("")
    assert main(["run", str(quickstart), output, "--overwrite"]) == 2
    assert not ran
    assert (tmp_path / "quickstart" / "precious").exists()


def test_resume_continues_in_place(ran, quickstart: Path, tmp_path: Path):
    earlier = a_run(tmp_path / "quickstart", quickstart)
    (earlier / "checkpoints").mkdir()
    (earlier / "checkpoints" / "LATEST").write_text("round-0001")
    main(["resume", str(earlier)])
    assert ran == [(earlier, True)]
    assert (earlier / "precious").exists()


def test_resume_names_the_nearest_run(quickstart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    a_run(tmp_path / "quickstart", quickstart)
    assert main(["resume", str(tmp_path / "quikstart")]) == 8
    assert f"Did you mean {tmp_path / 'quickstart'}?" in capsys.readouterr().err


def test_plan_shows_every_client_and_the_total(quickstart: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", str(quickstart), "--cpus", "2", "--gpus", "0", "--memory-gib", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line[:1].isdecimal()]
    assert [row[0] for row in rows] == [str(client) for client in range(10)]
    assert {(row[1], row[6]) for row in rows} == {("phone", "4"), ("laptop", "8"), ("server", "16")}
    assert any(line.startswith("it fits: 2 client actors at once") for line in lines)
    assert any(line.startswith("a round of 10 clients: ") for line in lines)


def test_plan_shows_the_ranks_of_a_client_of_several_devices(quickstart: Path, capsys: pytest.CaptureFixture[str]):
    plan = ["plan", str(quickstart), "clients.tiers.2.device=2", "--cpus", "8", "--memory-gib", "64"]
    assert main([*plan, "--gpus", "2"]) == 0
    out = capsys.readouterr().out
    assert "2 ranks of 1 GPU, 0.25 CPU" in out
    assert main([*plan, "--gpus", "1"]) == 5
    assert "has 1 GPU free of 1" in capsys.readouterr().err


def test_plan_shows_tiers_where_clients_are_many(quickstart: Path, capsys: pytest.CaptureFixture[str]):
    main(["plan", str(quickstart), "clients.count=1000", "--cpus", "2", "--gpus", "0", "--memory-gib", "16"])
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line[:1].isdecimal()]
    assert rows == [["500", "phone"], ["300", "laptop"], ["200", "server"]]


@pytest.mark.parametrize(("override", "code"), [("rounds=2", 0), ("clients.tiers.0.memory_gib=0.2", 5)])
def test_plan_answers_within_three_seconds_without_ray_or_torch(quickstart: Path, override: str, code: int):
    program = (
        "import sys; from hfedmoe_ray.cli import main; code = main(sys.argv[1:]);"
        "assert not {'ray', 'torch', 'deepspeed', 'transformers'} & set(sys.modules); sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program, "plan", str(quickstart), override], check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == code
    # Of the processor: by the clock, whatever else the machine does would count.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


def test_validate_reads_data_and_model(quickstart: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["validate", str(quickstart), "data.max_examples=900", "data.test_examples=100"]) == 0
    said = capsys.readouterr().out
    assert "900 training examples" in said
    assert "100 test examples, 20 classes" in said
    assert "2 MoE layers of 16 experts, 4 a token" in said


def test_validate_leaves_clients_own_files_alone(quickstart: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "test.jsonl").write_text('{"text": "a b c", "label": "x"}\n' * 3)
    own = [f"data.source={tmp_path}/client-{{client}}.jsonl", "data.partition={how: files}", "data.labels=[x, y]"]
    assert main(["validate", str(quickstart), *own, f"data.test={tmp_path}/test.jsonl"]) == 0
    assert "10 clients read their own files" in capsys.readouterr().out


def test_a_benchmark_without_its_repository_says_where_to_get_it(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("hfedmoe_ray.cli.measuring._REPOSITORY", tmp_path)
    assert main(["bench", "memory", "--json", "m.json"]) == 2
    assert "Clone the repository" in capsys.readouterr().err
