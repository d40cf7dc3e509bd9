"""A run's record goes through a log as text and comes out as the same files."""

import io
import tarfile
from pathlib import Path

import pytest

from hfedmoe_ray.errors import ClusterError
from hfedmoe_ray.runtime.archive import LINE, Receiver, pack


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    (path / "checkpoints").mkdir(parents=True)
    (path / "checkpoints" / "round.json").write_text("large")
    (path / "weights.safetensors").write_bytes(b"large")
    (path / "summary.json").write_text("{}")
    (path / "report.html").write_bytes(bytes(range(256)) * 400)
    return path


@pytest.mark.parametrize("size", [1, 7, 1000, 10**9])
def test_files_survive_a_log_that_arrives_in_pieces(run_dir: Path, tmp_path: Path, size: int):
    log = "before\n" + "\n".join(pack(run_dir)) + "\nafter\nunfinished"
    receiver = Receiver()
    shown = "".join(receiver.feed(log[start : start + size]) for start in range(0, len(log), size)) + receiver.flush()
    assert shown == "before\nafter\nunfinished"
    written = receiver.write(tmp_path / "home")
    assert {file.name for file in written} == {"summary.json", "report.html"}
    for file in written:
        assert file.read_bytes() == (run_dir / file.name).read_bytes()


def test_lines_stay_below_what_ray_cuts(run_dir: Path):
    lines = list(pack(run_dir))
    assert max(map(len, lines)) <= LINE
    assert all("\n" not in line for line in lines)


def test_damaged_or_missing_files_are_refused(run_dir: Path, tmp_path: Path):
    begin, body, end = pack(run_dir)
    for lines in (["nothing"], [begin, body], [begin, body[:-5], end]):
        receiver = Receiver()
        receiver.feed("\n".join(lines) + "\n")
        receiver.flush()
        with pytest.raises(ClusterError, match="without sending its files"):
            receiver.write(tmp_path / "home")


def test_names_that_lead_elsewhere_are_not_written(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    add = tarfile.TarFile.add

    def add_as(self: tarfile.TarFile, name: Path, arcname: str) -> None:
        add(self, name, arcname=arcname)
        for bad in ("../outside.json", "/tmp/hfedmoe-outside.json", "run.sh"):
            member = tarfile.TarInfo(bad)
            self.addfile(member, io.BytesIO(b""))

    monkeypatch.setattr(tarfile.TarFile, "add", add_as)
    receiver = Receiver()
    receiver.feed("\n".join(pack(run_dir)) + "\n")
    assert {file.name for file in receiver.write(tmp_path / "home")} == {"summary.json", "report.html"}
    assert not (tmp_path / "outside.json").exists()
