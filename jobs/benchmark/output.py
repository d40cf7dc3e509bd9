"""What every benchmark leaves: a table for people, and its figures as JSON for programs."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    what: str
    measured: str
    """With its unit."""
    bar: str = ""
    """What it must reach, e.g. "≤ 0.40"; empty where nothing is asked."""
    ok: bool = True


def json_option(command: Any) -> Any:
    """Gives a benchmark its `--json FILE`."""
    return click.option(
        "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the figures there."
    )(command)


def publish(title: str, figures: Mapping[str, Any], rows: Sequence[Row], json_file: Path | None) -> None:
    """Prints the table and writes the figures."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("")
    table.add_column("measured", justify="right")
    table.add_column("bar")
    for row in rows:
        verdict = f"{row.bar} {'' if row.ok else '[bold red]missed[/]'}" if row.bar else ""
        table.add_row(row.what, row.measured, verdict)
    Console(highlight=False, soft_wrap=True).print(table)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(figures, indent=2) + "\n")
