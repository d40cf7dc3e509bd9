"""The examination finds what is wrong, and says how to mend it."""

from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from small_run import small_experiment

from hfedmoe_ray import __version__, doctor
from hfedmoe_ray.cli import main
from hfedmoe_ray.diagnosis import Finding, NodeReport, fits, store_holds, survey_findings
from hfedmoe_ray.doctor import examine
from hfedmoe_ray.packing import NodeCapacity

Usage = namedtuple("Usage", "total used free")


def test_this_environment_runs_a_training_step_without_a_compiler():
    finding = doctor._training()
    assert finding.level == "ok", finding.what
    assert "works" in finding.what


def test_a_broken_installation_is_a_problem_with_its_last_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_TRAIN_PROBE", "raise ImportError('no module named torch')")
    finding = doctor._training()
    assert finding.level == "problem"
    assert "ImportError: no module named torch" in finding.what
    assert finding.remedy


def test_the_installed_packages_are_in_their_ranges():
    assert [finding.level for finding in doctor._packages()] == ["ok"]


def test_a_package_outside_its_range_is_named_with_the_range(monkeypatch: pytest.MonkeyPatch):
    declared = ["click>=99", "no-such-package>=1", "pydantic>=2", "never>=1; extra == 'dev'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: declared)
    wrong, missing, rest = doctor._packages()
    assert (wrong.level, missing.level, rest.level) == ("problem", "problem", "ok")
    assert "outside >=99" in wrong.what
    assert missing.remedy == "pip install 'no-such-package>=1'"
    assert rest.what.startswith("2 of 3 ")


def test_a_small_shared_memory_is_worth_a_note(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(64 << 20, 0, 64 << 20))
    finding = doctor._shared_memory()
    if Path("/dev/shm").is_dir():
        assert finding.level == "note"
        assert "--shm-size" in finding.remedy


def test_a_full_disk_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: Usage(1 << 40, 0, 1 << 30))
    assert doctor._disk("runs", tmp_path).level == "problem"


def test_a_directory_that_does_not_exist_yet_is_looked_at_through_its_parent(tmp_path: Path):
    assert doctor._disk("the cache", tmp_path / "not" / "yet").level == "ok"


@pytest.mark.parametrize(
    ("environment", "netrc", "says"),
    [
        ({"WANDB_API_KEY": "x" * 40}, "", "there is an API key"),
        ({}, "machine api.wandb.ai login user password secret\n", "there is an API key"),
        ({}, "machine elsewhere login user password secret\n", "no API key"),
        ({"WANDB_MODE": "disabled"}, "", "WANDB_MODE=disabled"),
    ],
)
def test_it_says_where_wandb_will_write(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, str], netrc: str, says: str
):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "netrc").write_text(netrc)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    finding = doctor._wandb()
    assert finding.level == "ok"
    assert says in finding.what


def test_a_ray_without_token_is_worth_a_note(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert doctor._ray_token().level == "note"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    finding = doctor._ray_token()
    assert finding.level == "ok"
    assert "RAY_AUTH_TOKEN" in finding.what
    assert "secret" not in finding.what


def test_an_unreachable_cluster_is_a_problem():
    finding = doctor._ray("127.0.0.1:9")
    assert finding.level == "problem"
    assert "127.0.0.1:9" in finding.what


@pytest.mark.parametrize(
    ("overrides", "gpus", "level", "says"),
    [
        ([], 0, "ok", "fit, 2 at once"),
        (["clients.tiers.0.device=0.3"], 1, "ok", "0.3 GPU"),
        (["clients.tiers.0.num_gpus=2", "clients.tiers.0.device=2"], 1, "problem", "tier phone"),
        (["clients.tiers.0.labels={site: far}"], 0, "problem", "has no label site=far"),
    ],
)
def test_it_says_whether_an_experiments_clients_find_room(overrides: list[str], gpus: int, level: str, says: str):
    node = NodeCapacity(node="n", name="n", cpus=2, gpus=gpus, memory_bytes=16 << 30)
    finding = fits(small_experiment(overrides), [node])
    assert finding.level == level
    assert says in finding.what


def test_an_object_store_too_small_for_a_round_is_worth_a_note():
    experiment = small_experiment()
    assert store_holds(experiment, 1 << 30, "here").level == "ok"
    small = store_holds(experiment, 1 << 20, "here")
    assert small.level == "note"
    assert "--object-store-memory=" in small.remedy
    few = small_experiment(["clients.per_round=1"])
    assert store_holds(few, 1 << 20, "here").remedy != small.remedy, "a smaller round needs less"


def test_what_nodes_say_of_themselves_becomes_findings():
    node = NodeReport(name="a", package=__version__, store_bytes=8, shm_bytes=8, sees=True, writes=True)
    assert [one.level for one in survey_findings([node, node])] == ["ok", "ok"]

    def problems(**changes: object) -> str:
        findings = survey_findings([node, replace(node, name="b", **changes)])
        return " ".join(f"{one.level}: {one.what}" for one in findings if one.level != "ok")

    assert problems(error="No module named 'hfedmoe_ray'.").startswith("problem: node b cannot run clients")
    assert "but b has 0.0" in problems(package="0.0")
    assert problems(shm_bytes=4).startswith("note: node b: /dev/shm")
    assert problems(sees=False, writes=False) == "note: the run directory is not shared: not seen by 1 node (b)"
    assert problems(writes=False).startswith("problem: the run directory is shared, but cannot be written on b")


@pytest.mark.ray
def test_a_private_ray_starts():
    finding = doctor._ray(None)
    assert finding.level == "ok"
    assert "1 node," in finding.what


@pytest.mark.parametrize(("level", "code"), [("ok", 0), ("note", 0), ("problem", 1)])
def test_the_exit_code_tells_whether_there_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], level: str, code: int
):
    found = [Finding(level="ok", what="fine"), Finding(level=level, what="so-so", remedy="do this")]
    monkeypatch.setattr(doctor, "examine", lambda *_: iter(found))
    assert main(["doctor"]) == code
    said = capsys.readouterr().out
    assert all(word in said for word in ("fine", level, "so-so", "do this"))


def test_the_named_cluster_is_examined_last(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "_training", lambda: Finding(level="ok", what=""))
    monkeypatch.setattr(doctor, "_ray", lambda address: Finding(level="ok", what=f"ray {address}"))
    monkeypatch.setattr(doctor, "_cluster", lambda *_: iter(()))
    assert [finding.what for finding in examine("head:6379")][-2:] == ["ray None", "ray head:6379"]
