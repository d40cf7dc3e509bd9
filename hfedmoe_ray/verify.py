"""Running the last rounds of a run again, from one of its checkpoints, to show that they come out as they did."""

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from hfedmoe_ray.config.evaluation import Evaluation
from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.config.running import Tracking, Wandb
from hfedmoe_ray.errors import CheckpointError, ConfigError
from hfedmoe_ray.types import Array


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A round that was run again."""

    round: int
    tensors: int
    """Compared: weights, profiles, and the states of strategy, server optimizer and clients."""
    different: tuple[str, ...]
    """Names of those that came out otherwise; empty: every bit is the same."""


def verify_run(
    run_dir: Path, *, rounds: int, backend: str | None, render: Callable[[str, Any], None]
) -> list[Verified]:
    """Runs the last rounds of a run again, in a directory of their own, and compares every bit of what they leave.

    Args:
        run_dir: The run's directory, of which nothing is changed.
        rounds: Most rounds to run again; fewer where the checkpoint before them is no longer kept.
        backend: Where, if not where the run was: "local" or "ray". Results do not depend on it.
        render: Told what happens (see `runtime.federate.Render`).

    Raises:
        CheckpointError: There are not two checkpoints to run between, or one is damaged.
        ConfigError: The run draws noise in secret.
        HFedMoEError: What the run itself raises.
    """
    from hfedmoe_ray.runtime import session

    kept = sorted((run_dir / "checkpoints").glob("round-*"))
    if len(kept) < 2:
        raise CheckpointError(
            f"{run_dir} keeps {len(kept)} checkpoints, and a round is run again from one to the next: let the run "
            "finish at least one round, with runtime.keep_checkpoints at 2 or more."
        )
    start, *repeated = kept[-rounds - 1 :]
    experiment = load_experiment(run_dir / "config.yaml")
    if not experiment.privacy.repeatable:
        raise ConfigError(
            f"{run_dir} draws noise in secret (the section `privacy`), which is its point: no round of it comes out "
            "alike twice, so there is nothing to verify."
        )
    last = _round(repeated[-1])
    again = experiment.model_copy(
        update={
            "rounds": last,
            "backend": backend or experiment.backend,
            "evaluate": Evaluation(every=last + 1, own="never"),
            "runtime": experiment.runtime.model_copy(update={"keep_checkpoints": len(repeated) + 1}),
            "tracking": Tracking(wandb=Wandb(mode="disabled")),
        }
    )
    with tempfile.TemporaryDirectory(prefix="hfedmoe-verify-") as directory:
        checkpoints = Path(directory) / "checkpoints"
        shutil.copytree(start, checkpoints / start.name)
        (checkpoints / "LATEST").write_text(start.name + "\n")
        ledger = run_dir / "checkpoints" / "privacy.jsonl"
        if ledger.exists():
            shutil.copy(ledger, checkpoints)
        session.run(again, Path(directory), resume=True, render=render)
        # Profiles for a round that this repetition does not reach were not taken.
        ahead = _round(repeated[-1]) if last < experiment.rounds else None
        return [_compare(one, checkpoints / one.name, profiles=_round(one) != ahead) for one in repeated]


def _round(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("round-"))


def _compare(first: Path, second: Path, *, profiles: bool) -> Verified:
    one, other = _everything(first), _everything(second)
    names = sorted(name for name in one.keys() | other.keys() if profiles or not name.startswith("profile/"))
    different = [name for name in names if not _same(one.get(name), other.get(name))]
    return Verified(round=_round(first), tensors=len(names), different=tuple(different))


def _everything(checkpoint: Path) -> dict[str, Array]:
    """All tensors of a checkpoint, and the clients' states as bytes."""
    try:
        clients = json.loads((checkpoint / "state.json").read_text())["clients"]
        tensors: dict[str, Array] = load_file(checkpoint / "state.safetensors")
        for client in clients:
            name = f"client-{client}.bin"
            tensors[name] = np.frombuffer((checkpoint / name).read_bytes(), dtype=np.uint8)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint} is damaged ({error}), so it cannot be compared with."
        ) from error
    return tensors


def _same(one: Array | None, other: Array | None) -> bool:
    """Whether two arrays have the same bits."""
    if one is None or other is None:
        return False
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
