"""The command line: `hfedmoe run`, `plan`, `validate`, `doctor` and the others.

Every command imports what it needs when it runs, so that `--help`, `plan` and every refusal answer at once. A mistake
of the user (`HFedMoEError`) is told in one paragraph on standard error; anything else is a bug, and shows a traceback.
"""

import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hfedmoe_ray import __version__
from hfedmoe_ray.errors import CheckpointError, ConfigError, HFedMoEError

if TYPE_CHECKING:
    from hfedmoe_ray.config.schema import Experiment

HELP = """
Federated fine-tuning of Mixture-of-Experts models, each client within its compute budget.

\b
Examples:
  hfedmoe plan configs/quickstart.yaml
  hfedmoe run configs/quickstart.yaml rounds=4 strategy=random name=random-4
  hfedmoe resume runs/random-4

A CONFIG is a YAML file; KEY=VALUE overrides one of its keys, such as local.steps=5 or
clients.tiers.0.experts=0.25.
"""
EXIT_CODES = """
\b
Exit codes:
  0  success                    5  clients do not fit the machine, cluster or budget
  1  a bug (with a traceback)   6  Ray cluster unreachable, or refused
  2  configuration or usage     7  training stopped, or `doctor` found a problem
  3  data                       8  run directory or checkpoint
  4  model                    130  interrupted: go on with `hfedmoe resume`
"""
CONFIG = click.Path(path_type=Path)
BUG = "error: this is a bug in hfedmoe, not a mistake of yours. Please report it with the traceback above."


class Interrupted(HFedMoEError):
    """The user pressed Ctrl-C during a run that can go on."""

    exit_code = 130


class _InOrder(click.Group):
    """Lists its commands in the order in which they are written here, the order of use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(super().list_commands(ctx), key=list(self.commands).index)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code (see `hfedmoe --help`)."""
    try:
        code = commands.main(arguments, prog_name="hfedmoe", standalone_mode=False)
    except HFedMoEError as error:
        click.echo(f"{'interrupted' if isinstance(error, Interrupted) else 'error'}: {error}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return ConfigError.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return Interrupted.exit_code
    except Exception:
        traceback.print_exc()
        click.echo(BUG, err=True)
        return 1
    return code if isinstance(code, int) else 0


@click.group(
    cls=_InOrder,
    help=HELP,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="hfedmoe")
def commands() -> None:
    """The group all commands belong to."""


@commands.command()
@click.argument("config", type=CONFIG)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--overwrite", is_flag=True, help="Delete an earlier run of the same name first.")
def run(config: Path, overrides: tuple[str, ...], overwrite: bool) -> None:
    """Run an experiment; its record is written to runs/NAME/."""
    from hfedmoe_ray.config.load import load_experiment

    experiment = load_experiment(config, overrides)
    run_dir = Path(experiment.output) / experiment.name
    _make_room(run_dir, overwrite)
    _train(experiment, run_dir, resume=False)


@commands.command()
@click.argument("run_dir", metavar="RUN", type=CONFIG)
def resume(run_dir: Path) -> None:
    """Go on with a run that was interrupted, from its last complete round.

    RUN is its directory, such as runs/quickstart. The result is the one the run would have had undisturbed.
    """
    from hfedmoe_ray.config.load import load_experiment

    _check_is_run(run_dir)
    _train(load_experiment(run_dir / "config.yaml"), run_dir, resume=True)


@commands.command()
@click.argument("config", type=CONFIG)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def validate(config: Path, overrides: tuple[str, ...]) -> None:
    """Check a configuration, its data and its model, without training."""
    from hfedmoe_ray.config.load import load_experiment
    from hfedmoe_ray.validate import check_sources

    experiment = load_experiment(config, overrides)
    for fact in check_sources(experiment):
        click.echo(fact)
    click.echo(f"{config} is valid. See what it needs: hfedmoe plan {config}")


def _train(experiment: "Experiment", run_dir: Path, *, resume: bool) -> None:
    """Runs the experiment in this terminal and writes the report."""
    from hfedmoe_ray.runtime import session
    from hfedmoe_ray.tracking.console import ConsoleRenderer
    from hfedmoe_ray.tracking.report import write_report

    try:
        session.run(experiment, run_dir, resume=resume, render=ConsoleRenderer())
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
            "(name=…), or delete it first (--overwrite)."
        )
    shutil.rmtree(run_dir)


def _check_is_run(run_dir: Path) -> None:
    from hfedmoe_ray.config.explain import closest

    if not (run_dir / "config.yaml").is_file():
        siblings = [str(one.parent) for one in run_dir.parent.glob("*/config.yaml")]
        raise CheckpointError(
            f"{run_dir} is not a run directory: it has no config.yaml.{closest(str(run_dir), siblings)} "
            "Runs are in runs/NAME unless `output` says otherwise."
        )


if __name__ == "__main__":
    sys.exit(main())
