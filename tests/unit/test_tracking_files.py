"""The record of a run: what is written can be read back, survives a crash, and never tells a round twice."""

import dataclasses
import json
import math
from enum import IntEnum
from pathlib import Path

import numpy as np
import pytest
from recorded_run import CONFIG, LABELS, ROUNDS, TIERS, facts, record_run, round_report, summary, tell_round

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import CheckpointError
from hfedmoe_ray.tracking.files import FileTracker
from hfedmoe_ray.tracking.jsonl import append_line, dumps, plain, read_lines, write_atomic
from hfedmoe_ray.tracking.record import read_run
from hfedmoe_ray.tracking.tiers import by_tier
from hfedmoe_ray.tracking.versions import git_commit, software_versions
from hfedmoe_ray.types import ExpertKey


def strict(text: str) -> object:
    def refuse(name: str) -> object:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def rounds_in(path: Path) -> list[int]:
    return [line["round"] for line in read_lines(path)]


def test_numbers_that_are_not_finite_become_null() -> None:
    value = {"a": math.nan, "b": [math.inf, 1.5], "c": np.float32("nan"), "d": np.array([-math.inf, 2.0])}
    assert strict(dumps(value)) == {"a": None, "b": [None, 1.5], "c": None, "d": [None, 2.0]}


def test_everything_a_run_tells_has_a_plain_form() -> None:
    class Level(IntEnum):
        HIGH = 2

    told = {
        1: (np.int64(3), np.bool_(True)),
        "key": ExpertKey(1, 2),
        "path": Path("a/b"),
        "set": {"y", "x"},
        "enum": Level.HIGH,
        "odd": "caf\udce9 <é>",
    }
    assert plain(told) == {
        "1": [3, True],
        "key": [1, 2],
        "path": "a/b",
        "set": ["x", "y"],
        "enum": 2,
        "odd": "caf\udce9 <é>",
    }
    assert strict(dumps(told)) == plain(told)


def test_a_torn_last_line_is_left_out_and_a_damaged_one_refused(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_line(path, {"round": 0})
    with path.open("a") as stream:
        stream.write('{"round": 1, "los')
    assert read_lines(path) == [{"round": 0}]
    path.write_text('{"round": 0}\nnonsense\n{"round": 1}\n')
    with pytest.raises(CheckpointError, match="line 2"):
        read_lines(path)


def test_an_atomic_write_leaves_one_file(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a.json", "1")
    write_atomic(tmp_path / "a.json", "2")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "2"


def test_a_run_comes_back_as_it_was_told(tmp_path: Path) -> None:
    run = read_run(record_run(tmp_path))
    assert len(run.rounds) == ROUNDS + 1
    for number, read in enumerate(run.rounds):
        assert plain(read) == plain(round_report(number))
    assert run.labels == LABELS
    assert plain(run.partition) == facts()["partition"]
    assert [client.tier for client in run.clients] == TIERS
    assert run.summary == plain(summary())
    assert run.tiers == ("phone", "laptop", "server")


def test_every_line_is_strict_json_with_its_time(tmp_path: Path) -> None:
    tracker = FileTracker(tmp_path)
    tracker.start(CONFIG, facts())
    tracker.round(dataclasses.replace(round_report(1), loss=math.nan, agreement=math.inf))
    tracker.event("odd", {"value": math.nan})
    for name in ("metrics.jsonl", "events.jsonl"):
        for text in (tmp_path / name).read_text().splitlines():
            assert strict(text)["time"]
    (line,) = read_lines(tmp_path / "metrics.jsonl")
    assert line["loss"] is None and line["agreement"] is None
    assert "clients" not in line


def test_the_configuration_can_be_run_again_and_names_versions(tmp_path: Path) -> None:
    FileTracker(tmp_path).start(CONFIG, facts(versions={"torch": "9.9"}))
    assert load_experiment(tmp_path / "config.yaml") == Experiment.model_validate(CONFIG)
    text = (tmp_path / "config.yaml").read_text()
    assert "# torch: 9.9" in text
    assert "# python: " in text
    assert json.loads((tmp_path / "facts.json").read_text())["versions"]["ray"] == software_versions()["ray"]


def test_a_commit_is_only_told_of_tracked_files(tmp_path: Path) -> None:
    assert git_commit(tmp_path / "file.py") is None
    checkout = Path(__file__).parents[2]
    if (checkout / ".git").exists():
        untracked = checkout / "hfedmoe_ray" / "no-such-file.py"
        assert git_commit(untracked) is None
        assert len(git_commit(checkout / "pyproject.toml").removesuffix("-dirty")) == 40


def test_each_client_result_stands_once_however_it_was_told(tmp_path: Path) -> None:
    tracker = FileTracker(tmp_path)
    tracker.start(CONFIG, facts())
    report = round_report(1)
    for client in report.clients[:4]:
        tracker.event("client", dataclasses.asdict(client))
    tracker.round(report)
    told = [line["client"] for line in read_lines(tmp_path / "events.jsonl") if line["event"] == "client"]
    assert told == list(range(len(TIERS)))


def test_resuming_takes_back_later_rounds_and_repeats_none(tmp_path: Path) -> None:
    undisturbed = record_run(tmp_path / "undisturbed")
    resumed = tmp_path / "resumed"
    killed = FileTracker(resumed)
    killed.start(CONFIG, facts())
    for number in range(6):
        tell_round(killed, round_report(number))
    killed.event("warning", {"message": "a disk is slow"})
    with (resumed / "metrics.jsonl").open("a") as stream:
        stream.write('{"time": "2026')

    tracker = FileTracker(resumed)
    tracker.start(CONFIG, facts(resumed_from=3))
    tracker.round(round_report(3))  # as where it was still to be evaluated
    assert rounds_in(resumed / "metrics.jsonl") == [0, 1, 2, 3]
    assert max(line.get("round", 0) for line in read_lines(resumed / "events.jsonl")) == 3
    assert not (resumed / "summary.json").exists()
    for number in range(4, ROUNDS + 1):
        tell_round(tracker, round_report(number))
    tracker.finish(summary())

    assert rounds_in(resumed / "metrics.jsonl") == list(range(ROUNDS + 1))
    assert plain(read_run(resumed).rounds) == plain(read_run(undisturbed).rounds)
    happened = [line["event"] for line in read_lines(resumed / "events.jsonl")]
    assert happened.count("resumed") == 1
    assert happened.count("warning") == 1, "what names no round did happen and stays"
    assert happened.count("client") == len(TIERS) * (ROUNDS + 1)


def test_a_round_told_twice_stands_once(tmp_path: Path) -> None:
    tracker = FileTracker(tmp_path)
    tracker.start(CONFIG, facts())
    for number in (0, 1):
        tracker.round(round_report(number))
    tracker.round(dataclasses.replace(round_report(1), accuracy=0.5))
    assert rounds_in(tmp_path / "metrics.jsonl") == [0, 1]
    assert read_run(tmp_path).rounds[1].accuracy == 0.5


def test_a_fresh_start_replaces_the_former_record(tmp_path: Path) -> None:
    record_run(tmp_path)
    FileTracker(tmp_path).start(CONFIG, facts())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "facts.json"]


def test_the_last_result_of_a_client_in_a_round_counts(tmp_path: Path) -> None:
    tracker = FileTracker(tmp_path)
    tracker.start(CONFIG, facts())
    late, ok = round_report(3).clients[7], round_report(4).clients[7]
    tracker.event("client", dataclasses.asdict(late))
    tracker.event("client", dataclasses.asdict(dataclasses.replace(ok, round=3)))
    assert [result.status for result in read_run(tmp_path).results] == ["ok"]


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        read_run(tmp_path)


def test_tier_means_leave_out_results_that_were_not_used() -> None:
    rows = by_tier(round_report(3).clients, ("server", "phone", "laptop", "absent"))
    assert list(rows) == ["server", "phone", "laptop"]
    laptop = rows["laptop"]
    used = [client for client in round_report(3).clients if client.tier == "laptop" and client.status == "ok"]
    assert laptop.clients == 3
    assert dict(laptop.statuses) == {"ok": 2, "late": 1}
    assert laptop.seconds == pytest.approx(sum(client.seconds for client in used) / 2)
    assert laptop.trained == 12
