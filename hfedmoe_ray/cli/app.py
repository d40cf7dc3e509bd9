"""The frame of the command line: what all commands share, and how every way to end becomes an exit code.

A mistake of the user (`HFedMoEError`) is told in one paragraph on standard error; anything else is a bug, and shows
its traceback.
"""

import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from hfedmoe_ray import __version__
from hfedmoe_ray.errors import ConfigError, HFedMoEError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

HELP = """
Federated fine-tuning of Mixture-of-Experts models, each client within its compute budget.

\b
Examples:
  hfedmoe init trial.yaml
  hfedmoe plan configs/quickstart.yaml
  hfedmoe run configs/quickstart.yaml rounds=4 strategy=random name=random-4
  hfedmoe resume runs/random-4

A CONFIG is a YAML file; KEY=VALUE overrides one of its keys, such as local.steps=5 or
clients.tiers.0.experts=0.25.
"""
EXIT_CODES = """
\b
Exit codes:
  0  success                      5  clients do not fit the machine, the cluster or their budget
  1  doctor found a problem,      6  Ray cluster unreachable, or refuses
     or a bug (with a traceback)  7  training stopped
  2  configuration or usage       8  run directory or checkpoint
  3  data                         9  a tracking server is unreachable, or refuses
  4  model                      130  interrupted: go on with `hfedmoe resume`
"""
COMPLETE = "_HFEDMOE_COMPLETE"
"""Set by the script of `hfedmoe completion`: then nothing runs, and what may come next is printed."""
BUG = "error: this is a bug in hfedmoe, not a mistake of yours. Please report it with the traceback above."

Command = TypeVar("Command", bound=Callable[..., Any])


class Interrupted(HFedMoEError):
    """The user pressed Ctrl-C during a run that can go on."""

    exit_code = 130


class _InOrder(click.Group):
    """Lists its commands in the order in which they were added."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(super().list_commands(ctx), key=list(self.commands).index)


@click.group(
    cls=_InOrder,
    help=HELP,
    epilog=EXIT_CODES,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="hfedmoe")
def commands() -> None:
    """The group all commands belong to."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line (default: this process's) and returns its exit code; see `hfedmoe --help`."""
    if COMPLETE in os.environ:
        import hfedmoe_ray.cli.completion  # noqa: F401  registers ours for bash
    try:
        code = commands.main(arguments, prog_name="hfedmoe", complete_var=COMPLETE, standalone_mode=False)
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


def examples(*lines: str) -> str:
    """The epilog of a command: how it is used."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def experiment_arguments(command: Command) -> Command:
    """Gives a command its CONFIG and [KEY=VALUE]... arguments."""

    def offered(context: click.Context, parameter: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        from hfedmoe_ray.cli.completion import complete_override

        return complete_override(context, parameter, incomplete)

    command = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=offered)(command)
    return click.argument("config", type=click.Path(path_type=Path))(command)
