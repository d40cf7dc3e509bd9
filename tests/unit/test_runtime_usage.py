"""How busy a machine is, measured without a GPU, with a made-up one, and with one that does not tell."""

import sys
import time
from pathlib import Path

import pytest

from hfedmoe_ray.runtime import usage

SMI = """#!{python}
import sys
assert any(one.startswith("--query-gpu=") for one in sys.argv)
print("{first}")
print("10, 0, 200")
"""


def made_up_smi(directory: Path, first: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = directory / "nvidia-smi"
    path.write_text(SMI.format(python=sys.executable, first=first))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))


def test_the_processor_is_seen_at_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    meter = usage.UsageMeter()
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    found = meter.read()
    assert 0 < found["cpu_percent"] <= 100
    assert 0 < found["memory_percent"] < 100
    assert found["gpu_percent"] == ()
    assert 0 <= meter.read()["cpu_percent"] <= 100, "at once again"


def test_gpus_are_told_as_mean_and_peak(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(usage, "SAMPLE_S", 0.01)
    made_up_smi(tmp_path, "90, 150, 200", monkeypatch)
    meter = usage.UsageMeter()
    until = time.monotonic() + 20
    while not (found := meter.read())["gpu_percent"] and time.monotonic() < until:
        time.sleep(0.05)
    meter.close()
    assert found["gpu_percent"] == (90, 10)
    assert found["gpu_memory_percent"] == (75, 0)


def test_a_gpu_that_does_not_tell_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with pytest.raises(ValueError, match="N/A"):
        usage.read_smi("[N/A], 150, 200\n")
    made_up_smi(tmp_path, "[N/A], 150, 200", monkeypatch)
    meter = usage.UsageMeter()
    time.sleep(0.3)
    assert meter.read()["gpu_percent"] == ()
