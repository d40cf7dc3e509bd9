"""Commands that run experiments, here or on a cluster, and use what they left: `run`, `resume`, `export` and others."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from hfedmoe_ray.cli.app import Interrupted, experiment_arguments
from hfedmoe_ray.errors import CheckpointError, ConfigError, TrainingError

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
    if not _has_checkpoint(run_dir):
        raise CheckpointError(
            f"{run_dir} has no complete round to go on from. Start it again: "
            f"hfedmoe run {run_dir}/config.yaml --overwrite"
        )
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
        raise Interrupted(_how_to_go_on(run_dir)) from None
    click.echo(f"report: {write_report(run_dir)}")


def _has_checkpoint(run_dir: Path) -> bool:
    return (run_dir / "checkpoints" / "LATEST").is_file()


def _how_to_go_on(run_dir: Path) -> str:
    if _has_checkpoint(run_dir):
        return f"the run is complete up to its last checkpoint. Go on with: hfedmoe resume {run_dir}"
    return "no round was complete, so there is nothing to resume. Start again with: hfedmoe run … --overwrite"


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


@click.command(short_help="Run the last rounds of a run again, and compare.")
@click.argument("run_dir", metavar="RUN", type=RUN_DIR)
@click.option("--rounds", type=click.IntRange(min=1), default=2, show_default=True, help="Rounds to run again.")
@click.option("--backend", type=click.Choice(["local", "ray"]), help="Where. Default: where the run was.")
def verify(run_dir: Path, rounds: int, backend: str | None) -> None:
    """Run the last rounds of a run again from its checkpoints, and compare every bit of what they leave.

    Nothing of the run is changed. Fails with 7 where something came out otherwise. Example:
    hfedmoe verify runs/quickstart --backend local
    """
    from hfedmoe_ray.tracking.console import ConsoleRenderer
    from hfedmoe_ray.verify import verify_run

    _check_is_run(run_dir)
    with ConsoleRenderer(run_dir) as render:
        verified = verify_run(run_dir, rounds=rounds, backend=backend, render=render)
    for one in verified:
        verdict = "the same to the last bit" if not one.different else f"{len(one.different)} differ"
        click.echo(f"round {one.round}: {one.tensors} tensors, {verdict}")
    different = [one for one in verified if one.different]
    if different:
        few = ", ".join(different[0].different[:3])
        raise TrainingError(
            f"Round {different[0].round} of {run_dir} came out otherwise when it was run again; first in: {few}. "
            "Either library versions differ from those in its config.yaml, or threads or devices do, or it is a bug."
        )


@click.command()
@click.argument("run_dirs", metavar="RUN...", nargs=-1, required=True, type=RUN_DIR)
def report(run_dirs: tuple[Path, ...]) -> None:
    """Write report.html of one or more runs, finished or not."""
    from hfedmoe_ray.tracking.report import write_report

    for run_dir in run_dirs:
        _check_is_run(run_dir)
        click.echo(write_report(run_dir))


@click.command(short_help="Write what a run trained for transformers or peft.")
@click.argument("run_dir", metavar="RUN", type=RUN_DIR)
@click.option(
    "--format",
    "form",
    type=click.Choice(["hf", "peft"]),
    default="hf",
    show_default=True,
    help="hf: the whole model, LoRA factors merged. peft: the factors as an adapter, and under base/ its base model.",
)
@click.option("--output", type=RUN_DIR, help="Where to write. Default: RUN/exported/FORMAT.")
def export(run_dir: Path, form: Literal["hf", "peft"], output: Path | None) -> None:
    """Write what a run had trained at its last complete round for transformers or peft.

    Private weights of clients (strategy local) are not part of it. Fails with 8 where there is no complete round, and
    with 2 where the run trained whole experts and --format is peft.
    """
    from hfedmoe_ray.export import export_run

    _check_is_run(run_dir)
    directory = output or run_dir / "exported" / form
    export_run(run_dir, form, directory)
    click.echo(directory)


@click.command(short_help="Run an experiment on a Ray cluster, as a job.")
@experiment_arguments
@click.option("--address", metavar="URL", help="Dashboard of the cluster. Default: $RAY_API_SERVER_ADDRESS, else here.")
@click.option("--no-follow", is_flag=True, help="Return at once instead of showing the log and fetching the results.")
@click.option("--overwrite", is_flag=True, help="Delete an earlier run of the same name first, there and here.")
def submit(config: Path, overrides: tuple[str, ...], address: str | None, no_follow: bool, overwrite: bool) -> int:
    """Run an experiment on a Ray cluster, as a job; its log is shown, its record fetched to runs/NAME/.

    This package and the configuration are uploaded; the cluster's own environment is used. Example:
    hfedmoe submit configs/quickstart.yaml --address http://head:8265
    """
    from hfedmoe_ray.runtime import jobs

    return jobs.submit(config, overrides, address, follow=not no_follow, overwrite=overwrite)
