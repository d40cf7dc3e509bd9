"""Commands for what runs have told of themselves elsewhere: `wandb sync`."""

from pathlib import Path

import click

from hfedmoe_ray.cli.app import examples

_EXAMPLES = examples("hfedmoe wandb sync runs/quickstart", "hfedmoe wandb sync runs/*")


@click.group(short_help="Send to Weights & Biases what runs have logged offline.", epilog=_EXAMPLES)
def wandb() -> None:
    """Weights & Biases."""


@wandb.command(short_help="Send runs that were logged offline.", epilog=_EXAMPLES)
@click.argument("run_dirs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
def sync(run_dirs: tuple[Path, ...]) -> None:
    """Send what runs have logged offline to Weights & Biases; what was sent before is left out.

    RUN is a run's directory. Fails with 2 where there is no API key, with 8 where a run has logged nothing offline, and
    with 9 where the server cannot be reached.
    """
    from hfedmoe_ray.tracking import sync as sending

    logs = [log for run_dir in run_dirs for log in sending.offline_logs(run_dir)]
    if not logs:
        click.echo("everything has been sent already")
        return
    sending.sync(logs)
