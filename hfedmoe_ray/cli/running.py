"""Commands that run experiments and look at what they left: `run`, `resume`, `report`, `submit`."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hfedmoe_ray.cli.app import Interrupted, experiment_arguments
from hfedmoe_ray.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from hfedmoe_ray.config.schema import Experiment

RUN_DIR = click.Path(path_type=Path)


@click.command()
@experiment_arguments
@click.option("--overwrite", is_flag=True, help="Delete an earlier run of the same name first.")
def run(config: Path, overrides: tuple[str, ...], overwrite: bool) -> None:
    """Run an experiment; its record is written to runs/NAME/."""
    from hfedmoe_ray.config.load import load_experiment

    experiment = load_experiment(config, overrides)
    run_dir = Path(experiment.output) / experiment.name
    _make_room(run_dir, overwrite)
    _train(experiment, run_dir, resume=False)


@click.command(short_help="Go on with an interrupted run.")
@click.argument("run_dir", metavar="RUN", type=RUN_DIR)
def resume(run_dir: Path) -> None:
    """Go on with an interrupted run from its last complete round.

    RUN is its directory, such as runs/quickstart. The result is the one the run would have had undisturbed.
    """
    from hfedmoe_ray.config.load import load_experiment

    _check_is_run(run_dir)
    _train(load_experiment(run_dir / "config.yaml"), run_dir, resume=True)


def _train(experiment: "Experiment", run_dir: Path, *, resume: bool) -> None:
    """Runs the experiment in this terminal and writes the report."""
    from hfedmoe_ray.runtime import session
    from hfedmoe_ray.tracking.console import ConsoleRenderer
    from hfedmoe_ray.tracking.report import write_report

    try:
        with ConsoleRenderer(run_dir) as render:
            session.run(experiment, run_dir, resume=resume, render=render)
    except KeyboardInterrupt:
        raise Interrupted(f"stopped. Go on from the last complete round with: hfedmoe resume {run_dir}") from None
    click.echo(f"report: {write_report(run_dir)}")


def _make_room(run_dir: Path, overwrite: bool) -> None:
    """Makes sure that a new run does not mix with an earlier one."""
    if not run_dir.exists() or (run_dir.is_dir() and not any(run_dir.iterdir())):
        return
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"{run_dir} exists and is not a run of hfedmoe. Choose another name=… or output=….")
    if not overwrite:
        raise ConfigError(
            f"{run_dir} already holds a run. Go on with it (hfedmoe resume {run_dir}), choose another name "
            "(name=…), or have it deleted first (--overwrite)."
        )
    shutil.rmtree(run_dir)


def _check_is_run(run_dir: Path) -> None:
    from hfedmoe_ray.config.explain import closest

    if not (run_dir / "config.yaml").is_file():
        siblings = [str(one.parent) for one in run_dir.parent.glob("*/config.yaml")]
        raise CheckpointError(
            f"{run_dir} is not the directory of a run: there is no config.yaml in it.{closest(str(run_dir), siblings)} "
            "Runs are in runs/NAME unless their `output` says otherwise."
        )


@click.command()
@click.argument("run_dirs", metavar="RUN...", nargs=-1, required=True, type=RUN_DIR)
def report(run_dirs: tuple[Path, ...]) -> None:
    """Write report.html of one or more runs, finished or not."""
    from hfedmoe_ray.tracking.report import write_report

    for run_dir in run_dirs:
        _check_is_run(run_dir)
        click.echo(write_report(run_dir))
