"""Commands for runs that were submitted to a cluster: `status`, `logs`, `stop`."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from hfedmoe_ray.cli.app import examples

Command = TypeVar("Command", bound=Callable[..., Any])


def _address(command: Command) -> Command:
    told = "Dashboard of the cluster. Default: $RAY_API_SERVER_ADDRESS, else here."
    return click.option("--address", metavar="URL", help=told)(command)


@click.command(
    short_help="List the runs that were submitted to a cluster.",
    epilog=examples("hfedmoe status --address http://head:8265"),
)
@_address
def status(address: str | None) -> None:
    """List the runs that were submitted to a cluster: name, job, how it stands, since when and for how long."""
    from rich.console import Console
    from rich.table import Table

    from hfedmoe_ray.runtime.job_server import connect, submitted_runs, told

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("run", "job", "status", "submitted", "took", ""):
        table.add_column(heading, no_wrap=heading in ("run", "job", "submitted", "took"))
    for row in told(submitted_runs(connect(address))):
        table.add_row(*row)
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 120)
    console.print(table if table.row_count else "no run was submitted to this cluster")


@click.command(
    short_help="Show the log of a submitted run, and fetch its record.",
    epilog=examples("hfedmoe logs quickstart --address http://head:8265"),
)
@click.argument("run", required=False)
@_address
@click.option("--no-follow", is_flag=True, help="Show what there is, rather than wait for the end.")
def logs(run: str | None, address: str | None, no_follow: bool) -> int:
    """Show the log of a submitted run to its end; its record is then fetched to where `submit` would have.

    RUN is its name, or its job's; without it, the latest. Exits with the job's own code.
    """
    from hfedmoe_ray.runtime import jobs

    return jobs.logs(run, address, follow=not no_follow)


@click.command(
    short_help="End a submitted run.",
    epilog=examples("hfedmoe stop quickstart --address http://head:8265"),
)
@click.argument("run")
@_address
def stop(run: str, address: str | None) -> None:
    """End a submitted run. Its last checkpoint stays, on the node its server was on.

    RUN is its name, or its job's.
    """
    from hfedmoe_ray.runtime import job_server

    client = job_server.connect(address)
    found = job_server.find_run(client, run)
    if found.over:
        click.echo(f"{found.run} ({found.job}) had ended already: {found.status.lower()}")
        return
    now = job_server.stop(client, found)
    click.echo(f"{now.run} ({now.job}): {now.status.lower()}")
