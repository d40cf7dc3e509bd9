"""Whole runs: the same model wherever the clients run, news in order, errors as the classes they were."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from small_run import small_experiment

from hfedmoe_ray.errors import CapacityError, ClusterError, DataError, HFedMoEError
from hfedmoe_ray.runtime import session
from hfedmoe_ray.runtime.cluster import connected
from hfedmoe_ray.runtime.server import News, Outcome

pytestmark = pytest.mark.ray


def run(run_dir: Path, *overrides: str) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    news: list[tuple[str, Any]] = []
    experiment = small_experiment([f"name={run_dir.name}", *overrides])
    summary = session.run(experiment, run_dir, resume=False, render=lambda name, fields: news.append((name, fields)))
    return summary, news


def test_every_way_to_run_gives_the_same_model_and_tells_the_same_story(tmp_path: Path):
    """With LoRA, whose factors every process adds to matrices it maps and the server factorises.

    Whole experts in pooled actors are compared with this process in tests/chaos, where one of them is killed.
    """
    keys = ("model.lora={rank: 4, attention: true}", "clients.count=2")
    runs = {
        "local": run(tmp_path / "local", "backend=local", *keys),
        "dedicated": run(tmp_path / "dedicated", "actors=dedicated", *keys),
    }
    assert not ray.is_initialized()
    assert len({summary["model_sha256"] for summary, _ in runs.values()}) == 1
    assert len({summary["simulated_seconds"] for summary, _ in runs.values()} - {None}) == 1
    for name, (summary, news) in runs.items():
        assert summary["status"] == "finished"
        assert (tmp_path / name / "summary.json").is_file()
        stages = [what for what, _ in news if what in ("preparing", "start", "round", "finish")]
        assert stages == ["preparing", "start", *["round"] * 4, "finish"]
        assert [fields.round for what, fields in news if what == "round"] == [0, 1, 2, 3]
        trained = [f["client"] for what, f in news if what == "task_finished" and f["kind"] == "train"]
        assert sorted(trained) == sorted([0, 1] * 3)


def test_an_error_in_the_server_is_the_same_error_in_the_driver(tmp_path: Path):
    """Clients that do not fit are refused first, before anything is read."""
    missing = f"data.source={tmp_path}/missing.jsonl"
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        run(tmp_path / "broken", missing)
    with pytest.raises(CapacityError, match=r"server .*64 ranks of 1 CPU"):
        run(tmp_path / "large", missing, "clients.tiers.2.device=64")
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("127.0.0.1:9", "Nothing answers at runtime.address 127.0.0.1:9"),
        ("somewhere", "write auto, or host:port"),
        ("ray://127.0.0.1:10001", "hfedmoe submit"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_one_clear_paragraph(address: str, what: str):
    with pytest.raises(ClusterError, match=what), connected(address):
        pass
    assert not ray.is_initialized()


def test_outcomes_cross_as_text():
    assert Outcome(summary={"rounds": 1}).result() == {"rounds": 1}
    with pytest.raises(DataError, match="no column"):
        Outcome.of(DataError("no column")).result()
    with pytest.raises(HFedMoEError):
        Outcome(error="HFedMoEError", message="x").result()
    with pytest.raises(RuntimeError, match=r"KeyError: 'x'\nTraceback") as caught:
        try:
            raise KeyError("x")
        except KeyError as error:
            Outcome.of(error).result()
    assert not isinstance(caught.value, HFedMoEError)
    with pytest.raises(RuntimeError):
        Outcome(error="annotations").result()


def test_news_is_delivered_once_in_order_and_ends():
    news = News()
    assert news.after(0, 0.0) == ([], False)
    for number in range(3):
        news.add("event", number)
    assert news.after(0, 0.0) == ([("event", 0), ("event", 1), ("event", 2)], False)
    assert news.after(2, 0.0) == ([("event", 2)], False)
    news.add("event", 3)
    news.close()
    assert news.after(3, 10.0) == ([("event", 3)], True)
    assert news.after(4, 10.0) == ([], True)


@pytest.mark.usefixtures("cluster")
def test_a_private_cluster_starts_what_it_needs_and_no_more():
    commands = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # of earlier tests, and about to be gone
            commands.append(" ".join(process.cmdline()))
    needed, spared = ("gcs_server", "raylet/raylet"), ("dashboard/dashboard.py", "log_monitor.py", "autoscaler")
    assert all(any(name in command for command in commands) for name in needed)
    assert not [command for command in commands if any(name in command for name in spared)]
