"""`hfedmoe verify`: rounds run again come out the same, a difference is found and named, the run stays as it was."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_federation import HFEDMOE, experiment

from hfedmoe_ray.cli import main
from hfedmoe_ray.errors import CheckpointError
from hfedmoe_ray.runtime import session
from hfedmoe_ray.verify import verify_run

TOPK = {"upload": "topk", "share": 0.05}


def ran(sources: Path, run_dir: Path, **changes: object) -> Path:
    made = experiment(sources, **{"tracking": {"wandb": {"mode": "disabled"}}, "rounds": 4} | changes)
    session.run(made, run_dir, resume=False, render=lambda *_: None)
    return run_dir


@pytest.fixture(scope="module")
def done(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose clients, strategy and server optimizer all have a state."""
    changes = {"strategy": HFEDMOE | {"coverage": 0.5}, "wire": TOPK, "server": {"optimizer": "fedadam"}}
    return ran(sources, tmp_path_factory.mktemp("verify") / "run", **changes)


def contents(directory: Path) -> dict[Path, str]:
    files = [file for file in sorted(directory.rglob("*")) if file.is_file()]
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_the_last_rounds_come_out_the_same_and_the_run_stays_as_it_was(done: Path, capsys: pytest.CaptureFixture[str]):
    before = contents(done)
    assert main(["verify", str(done)]) == 0
    assert contents(done) == before
    told = [line for line in capsys.readouterr().out.splitlines() if "tensors" in line]
    assert [line.split(":")[0] for line in told] == ["round 3", "round 4"]
    assert all(line.endswith("the same to the last bit") for line in told)
    names = {"global/expert/0.0/ffn_up", "strategy/holders", "client-0.bin"}
    checkpoint = done / "checkpoints" / "round-0004"
    compared = load_file(checkpoint / "state.safetensors").keys() | {one.name for one in checkpoint.glob("client-*")}
    assert len(compared) == int(told[-1].split()[2])
    assert {name.split("/")[0] for name in names} <= {name.split("/")[0] for name in compared}


@pytest.mark.parametrize("what", ["a weight", "a client's state"])
def test_one_other_bit_is_found_and_named(done: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]):
    run_dir = tmp_path / "run"
    shutil.copytree(done, run_dir)
    checkpoint = run_dir / "checkpoints" / "round-0003"
    if what == "a weight":
        tensors = load_file(checkpoint / "state.safetensors")
        name = next(name for name in sorted(tensors) if "/expert/" in name)
        tensors[name].view(np.uint8).flat[0] ^= 1
        save_file(tensors, checkpoint / "state.safetensors")
    else:
        name = "client-2.bin"
        state = bytearray((checkpoint / name).read_bytes())
        state[-1] ^= 1
        (checkpoint / name).write_bytes(state)
    assert main(["verify", str(run_dir)]) == 7
    captured = capsys.readouterr()
    assert "1 differ" in captured.out
    assert "Round 3" in captured.err
    assert name in captured.err


def test_a_run_that_stopped_early_can_be_verified_where_profiles_are_taken_ahead(sources: Path, tmp_path: Path):
    run_dir = ran(sources, tmp_path / "flux", strategy={"name": "flux"}, rounds=4)
    # As if it had been killed after round 3: profiles for round 4 were taken while round 3 was reduced.
    shutil.rmtree(run_dir / "checkpoints" / "round-0004")
    (run_dir / "checkpoints" / "LATEST").write_text("round-0003\n")
    (verified,) = verify_run(run_dir, rounds=5, backend="local", render=lambda *_: None)
    assert (verified.round, verified.different) == (3, ())


def test_one_checkpoint_is_not_enough(sources: Path, tmp_path: Path):
    run_dir = ran(sources, tmp_path / "run", rounds=1, runtime={"keep_checkpoints": 1})
    with pytest.raises(CheckpointError, match=r"keeps 1 checkpoints.*keep_checkpoints at 2 or more"):
        verify_run(run_dir, rounds=2, backend="local", render=lambda *_: None)
