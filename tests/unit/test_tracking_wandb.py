"""W&B: everything arrives in its file, and nothing it does can stop or disturb a run."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import wandb
import wandb_file
from recorded_run import EXPERTS, LAYERS, ROUNDS, TIERS, facts, round_report, summary, tell_run
from small_run import OVERRIDES, REPOSITORY
from wandb.sdk.launch.sweeps.utils import load_sweep_config
from wandb.wandb_agent import Agent

from hfedmoe_ray.cli import main
from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.config.running import Wandb
from hfedmoe_ray.tracking.files import FileTracker
from hfedmoe_ray.tracking.tracker import Trackers
from hfedmoe_ray.tracking.wandb import WandbTracker, resolve_mode

Capture = pytest.CaptureFixture[str]
OFFLINE = Wandb(mode="offline", project="tests", group="unit")


def tracker(
    run_dir: Path,
    warn: Callable[[str], object],
    settings: Wandb = OFFLINE,
    save_model: Callable[[Path], None] = Path.mkdir,
) -> Trackers:
    """W&B after the files, as a run has them."""
    wandb_tracker = WandbTracker(run_dir, settings, "quickstart", warn=warn, save_model=save_model)
    return Trackers([FileTracker(run_dir), wandb_tracker])


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The file of a whole run, and nothing on the screen."""
    run_dir = tmp_path_factory.mktemp("run") / "quickstart"
    warnings: list[str] = []
    tell_run(tracker(run_dir, warnings.append))
    assert not warnings
    (path,) = run_dir.glob("wandb/offline-run-*/*.wandb")
    yield path


def test_every_round_arrives_with_its_numbers(logged: Path) -> None:
    history = wandb_file.history(logged)
    assert [line["round"] for line in history] == list(range(ROUNDS + 1))
    for number, line in enumerate(history):
        report = round_report(number)
        assert line["global/accuracy"] == pytest.approx(report.accuracy)
        assert line["global/loss"] == pytest.approx(report.test_loss)
        assert line["train/loss"] == pytest.approx(report.loss)
        assert line["traffic/up_mib"] == pytest.approx(report.bytes_up / 2**20)
        assert line["seconds/evaluate"] == pytest.approx(report.phases["evaluate"])
        for tier in set(TIERS):
            assert line[f"tier/{tier}/seconds"] > 0
            assert line[f"tier/{tier}/experts_held"] > 0
    assert "own/accuracy" not in history[0], "what was not measured is left out"
    assert (history[3]["clients/ok"], history[3]["clients/late"]) == (9, 1)
    assert (history[5]["clients/failed"], history[5]["tier/phone/experts_trained"]) == (1, 6)


def test_every_round_has_its_heat_map_as_drawing_and_as_table(logged: Path) -> None:
    files = logged.parent / "files"
    for number, line in enumerate(wandb_file.history(logged)):
        report = round_report(number)
        page = (files / line["experts/heatmap.path"]).read_text()
        for layer in range(LAYERS):
            for expert in range(EXPERTS):
                told = f"layer {layer}, expert {expert}: {report.selected[layer][expert]}<"
                assert told in page
        table = json.loads((files / line["experts/selection.path"]).read_text())
        assert table["columns"] == ["layer", "expert", "clients", "usage"]
        assert [row[2] for row in table["data"]] == [count for row in report.selected for count in row]
        budgets = json.loads((files / line["clients/budgets.path"]).read_text())
        assert [row[2] for row in budgets["data"]] == [client["resident_experts"] for client in facts()["clients"]]


def test_the_run_knows_its_group_job_configuration_and_versions(logged: Path) -> None:
    run = wandb_file.run_record(logged)
    assert (run.project, run.display_name, run.run_group, run.job_type) == ("tests", "quickstart", "unit", "server")
    assert list(run.tags) == ["hfedmoe"]
    config = wandb_file.config(logged)
    assert config["clients"]["count"] == len(TIERS)
    assert {"python", "torch", "ray", "transformers", "deepspeed", "wandb"} <= set(config["versions"])
    assert wandb_file.summary(logged)["best_accuracy"] == pytest.approx(summary()["best_accuracy"])


def test_round_is_the_step_of_every_metric(logged: Path) -> None:
    metrics = [r.metric for r in wandb_file.records(logged) if r.WhichOneof("record_type") == "metric"]
    stepped = {metric.name or metric.glob_name for metric in metrics if metric.step_metric == "round"}
    assert "*" in stepped or "global/accuracy" in stepped


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tell_run(tracker(tmp_path / "quiet", print), last=0)
    assert capfd.readouterr() == ("", "")


def test_a_resumed_run_keeps_its_identity(tmp_path: Path) -> None:
    for resumed_from in (None, 0, None):
        tell_run(tracker(tmp_path, print), 0, facts(resumed_from=resumed_from))
    logs = sorted(tmp_path.glob("wandb/*offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    first, second, third = (wandb_file.run_record(path).run_id for path in logs)
    assert first == second
    assert third != first


@pytest.mark.parametrize(("broken", "where"), [("init", wandb), ("log", wandb.Run), ("finish", wandb.Run)])
def test_a_failure_is_told_once_and_never_raised(
    broken: str, where: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def fail(*_: object, **__: object) -> None:
        calls.append(broken)
        raise ConnectionError("W&B is on the moon\nsecond line")

    warnings: list[str] = []
    with monkeypatch.context() as broken_wandb:
        broken_wandb.setattr(where, broken, fail)
        tell_run(tracker(tmp_path / "broken", warnings.append))
    assert len(warnings) == 1
    assert "(ConnectionError: W&B is on the moon);" in warnings[0]
    assert (f"`hfedmoe wandb sync {tmp_path}/broken`" in warnings[0]) == (broken != "init"), (
        "nothing was written that could be sent"
    )
    assert calls == [broken], "after a failure W&B is left alone"

    # What the failed run left open in this process must not swallow the next one.
    tell_run(tracker(tmp_path / "next", warnings.append), last=1)
    (path,) = (tmp_path / "next").glob("wandb/offline-run-*/*.wandb")
    assert len(wandb_file.history(path)) == 2
    assert len(warnings) == 1


def test_a_run_whose_server_cannot_be_reached_is_logged_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("hfedmoe_ray.tracking.wandb.INIT_TIMEOUT_S", 2.0)
    warnings: list[str] = []
    tell_run(tracker(tmp_path, warnings.append, Wandb(mode="auto")), last=1)
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert [line["round"] for line in wandb_file.history(path)] == [0, 1]
    (warning,) = warnings
    assert "cannot be reached (CommError: " in warning
    assert f"`hfedmoe wandb sync {tmp_path}`" in warning
    assert wandb_file.run_record(path).run_id == (tmp_path / "wandb" / "run-id").read_text().strip()


def test_disabled_does_not_even_import_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    warnings: list[str] = []
    tell_run(tracker(tmp_path / "off", warnings.append, Wandb(mode="disabled")))
    assert not warnings
    assert not (tmp_path / "off" / "wandb").exists()


def test_auto_is_online_only_with_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_mode("auto") == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password " + "0" * 40)
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "http://wandb.example:8080")
    assert resolve_mode("auto") == "offline", "the key is another server's"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") == "disabled"
    assert resolve_mode("offline") == "offline"


def test_the_record_and_a_small_model_are_artifacts(tmp_path: Path) -> None:
    def save_model(directory: Path) -> None:
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(bytes(2**20))

    warnings: list[str] = []
    for name, limit in (("small", 1.5), ("large", 0.5)):
        settings = OFFLINE.model_copy(update={"model_mib": limit})
        tell_run(tracker(tmp_path / name, warnings.append, settings, save_model))
    logged = {
        name: {
            record.artifact.name: {entry.path for entry in record.artifact.manifest.contents}
            for record in wandb_file.records(next((tmp_path / name).glob("wandb/offline-run-*/*.wandb")))
            if record.WhichOneof("record_type") == "artifact" and not record.artifact.name.startswith("run-")
        }
        for name in ("small", "large")
    }
    record = {"config.yaml", "facts.json", "metrics.jsonl", "summary.json"}
    assert logged["small"] == {"quickstart-record": record, "quickstart-model": {"model.safetensors"}}
    assert logged["large"] == {"quickstart-record": record}
    (warning,) = warnings
    assert "has 1 MiB" in warning
    assert not (tmp_path / "large" / "wandb" / "model").exists()


def test_sending_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture) -> None:
    log = tmp_path / "run" / "wandb" / "offline-run-1" / "run-1.wandb"
    assert main(["wandb", "sync", str(tmp_path)]) == 8
    assert "nothing to send" in capfd.readouterr().err
    log.parent.mkdir(parents=True)
    log.touch()
    assert main(["wandb", "sync", str(tmp_path / "run")]) == 2
    assert "no API key" in capfd.readouterr().err
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert main(["wandb", "sync", str(tmp_path / "run")]) == 9
    assert "cannot be reached" in capfd.readouterr().err
    log.with_suffix(".wandb.synced").touch()
    assert main(["wandb", "sync", str(tmp_path / "run")]) == 0
    assert "already" in capfd.readouterr().out


def test_a_server_that_takes_nothing_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    """A server that is there and takes no key: the library ends with 0 all the same, and we do not."""
    tell_run(tracker(tmp_path, print), last=0)

    class Unauthorised(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(401)

        do_POST = do_GET  # noqa: N815

    with ThreadingHTTPServer(("127.0.0.1", 0), Unauthorised) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        code = main(["wandb", "sync", str(tmp_path)])
        server.shutdown()
    said = capfd.readouterr().err
    assert code == 9, said
    assert "offline-run" in said
    assert "`wandb sync` has not sent 1 of 1 logs" in said


def test_a_sweep_runs_experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B's own agent starts the command of configs/sweep.yaml, with a draw of its parameters."""
    sweep = load_sweep_config(str(REPOSITORY / "configs" / "sweep.yaml"))
    assert sweep is not None
    draw: dict[str, Any] = {key: one.get("values", [one.get("max")])[-1] for key, one in sweep["parameters"].items()}
    assert load_experiment(
        REPOSITORY / "configs" / "quickstart.yaml", [f"{key}={value}" for key, value in draw.items()]
    )
    small = dict(override.split("=", 1) for override in OVERRIDES if not override.startswith("tracking"))
    values = {**draw, **small, "rounds": 1, "backend": "local", "output": str(tmp_path)}
    monkeypatch.chdir(REPOSITORY)
    for name, value in {
        "WANDB_SWEEP_ID": "sweep1",
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_RUN_ID": "to be set",
        "WANDB_SWEEP_PARAM_PATH": "to be set",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }.items():
        monkeypatch.setenv(name, value)
    agent = Agent(None, None)
    agent._sweep_command = sweep["command"]
    agent._command_run(
        {"run_id": "run1", "program": sweep["program"], "args": {key: {"value": one} for key, one in values.items()}}
    )
    assert agent._run_processes["run1"].wait() == 0
    (log,) = (tmp_path / "sweep-run1").glob("wandb/offline-run-*/*.wandb")
    run = wandb_file.run_record(log)
    assert (run.run_id, run.sweep_id) == ("run1", "sweep1")
    assert wandb_file.config(log)["clients"]["tiers"][0]["experts"] == draw["clients.tiers.0.experts"]
    assert sweep["metric"]["name"] in wandb_file.summary(log)
