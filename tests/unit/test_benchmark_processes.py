"""A benchmark leaves nothing behind of what it started, however that ended."""

import sys
from pathlib import Path

import psutil
import pytest

BENCHMARK = Path(__file__).parents[2] / "jobs" / "benchmark"
FAMILY = "sleep 1000 & echo $! >> {log}; setsid sleep 1000 & echo $! >> {log}; {then}"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARK))
    yield
    sys.modules.pop("processes", None)


def alive(log: Path) -> list[int]:
    pids = [int(line) for line in log.read_text().split()]
    assert len(pids) == 2
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def test_what_is_too_slow_is_killed_with_all_it_has_started(tmp_path: Path):
    from processes import run_to_end

    log = tmp_path / "pids"
    ended = run_to_end(["bash", "-c", FAMILY.format(log=log, then="wait")], {}, tmp_path / "log", 3)
    assert ended.code is None
    assert not alive(log), "one of them even in a session of its own"


def test_what_ends_by_itself_leaves_no_process_of_its_session(tmp_path: Path):
    from processes import run_to_end

    log = tmp_path / "pids"
    family = FAMILY.replace("setsid ", "")
    ended = run_to_end(["bash", "-c", family.format(log=log, then="exit 3")], {"UNUSED": "1"}, tmp_path / "log", 60)
    assert ended.code == 3
    assert not alive(log)
