"""Run directories, as the command line and the library treat them: what is a run, and whether it can go on."""

import shutil
from pathlib import Path

from hfedmoe_ray.config.explain import closest
from hfedmoe_ray.errors import CheckpointError, ConfigError


def is_run(run_dir: Path) -> bool:
    """Whether a run has begun in the directory."""
    return (run_dir / "config.yaml").is_file()


def check_is_run(run_dir: Path) -> None:
    """Raises CheckpointError, with the nearest run, unless a run has begun in the directory."""
    if not is_run(run_dir):
        siblings = [str(one.parent) for one in run_dir.parent.glob("*/config.yaml")]
        raise CheckpointError(
            f"{run_dir} is not the directory of a run: there is no config.yaml in it.{closest(str(run_dir), siblings)} "
            "Runs are in runs/NAME unless their `output` says otherwise."
        )


def check_can_resume(run_dir: Path) -> None:
    """Raises CheckpointError unless the directory is that of a run with a complete round."""
    check_is_run(run_dir)
    if not _has_checkpoint(run_dir):
        raise CheckpointError(
            f"{run_dir} has no complete round to go on from. Start it again: "
            f"hfedmoe run {run_dir}/config.yaml --overwrite"
        )


def how_to_go_on(run_dir: Path) -> str:
    """What to tell whoever has interrupted a run."""
    if _has_checkpoint(run_dir):
        return (
            f"the run is complete up to its last checkpoint. Go on with: hfedmoe resume {run_dir} "
            f"(in Python: resume({str(run_dir)!r}))"
        )
    return (
        "no round was complete, so there is nothing to resume. Start again with: hfedmoe run … --overwrite "
        "(in Python: overwrite=True)"
    )


def check_empty(directory: Path, option: str) -> None:
    """Raises ConfigError where something is in the way of what is to be written; `option` names another place."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} holds something already. Name an empty directory with {option}, or remove it.")


def make_room(run_dir: Path, *, overwrite: bool) -> None:
    """Makes sure that a new run does not mix with an earlier one.

    Args:
        run_dir: Where the new run will write.
        overwrite: Whether an earlier run there is deleted. What is no run never is.

    Raises:
        ConfigError: the directory is in use.
    """
    if not run_dir.exists() or (run_dir.is_dir() and not any(run_dir.iterdir())):
        return
    if not is_run(run_dir):
        raise ConfigError(f"{run_dir} exists and is not a run of hfedmoe. Choose another name=… or output=….")
    if not overwrite:
        raise ConfigError(
            f"{run_dir} already holds a run. Go on with it (hfedmoe resume {run_dir}), choose another name "
            "(name=…), or have it deleted first (--overwrite; in Python overwrite=True)."
        )
    shutil.rmtree(run_dir)


def _has_checkpoint(run_dir: Path) -> bool:
    return (run_dir / "checkpoints" / "LATEST").is_file()
