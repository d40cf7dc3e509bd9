"""The command that compares strategies: `compare`."""

import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hfedmoe_ray.cli.app import Interrupted, examples, experiment_arguments
from hfedmoe_ray.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from hfedmoe_ray.comparison.design import Design, Run


class _SpacedGrid(click.Command):
    """Lets --grid take all the key=values that follow it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spread: list[str] = []
        inside = False
        for argument in args:
            if inside and "=" in argument and not argument.startswith("-"):
                if spread[-1] != "--grid":
                    spread.append("--grid")
            else:
                inside = argument == "--grid"
            spread.append(argument)
        return super().parse_args(ctx, spread)


@click.command(
    cls=_SpacedGrid,
    short_help="Compare strategies over seeds and settings.",
    epilog=examples(
        "hfedmoe compare configs/compare_20news.yaml",
        "hfedmoe compare configs/quickstart.yaml --strategies 'hfedmoe,hfedmoe[beta=0],random' \\",
        "    --seeds 0,1,2 --grid budget=0.125,0.25 alpha=0.1,0.5",
    ),
)
@experiment_arguments
@click.option("--strategies", metavar="A,B[KEY=VALUE],…", help="Strategies, or variants that CONFIG defines.")
@click.option("--seeds", metavar="0,1,2", help="Run seeds; the same for all.")
@click.option(
    "--grid",
    "grids",
    multiple=True,
    metavar="KEY=A,B …",
    help="Settings in all combinations: keys of overrides, or budget (experts of every tier) and alpha.",
)
@click.option("--output", type=click.Path(path_type=Path), help="Where to write. Default: runs/NAME of CONFIG.")
@click.option("--processes", type=click.IntRange(min=1), help="Runs at a time. Default: as many as fit this machine.")
def compare(
    config: Path,
    overrides: tuple[str, ...],
    *,
    strategies: str | None,
    seeds: str | None,
    grids: tuple[str, ...],
    output: Path | None,
    processes: int | None,
) -> None:
    """Run strategies on equal terms, and write tables, tests and figures.

    Every strategy runs in every setting with every seed. What is compared stands in CONFIG's section `compare`, or in
    the options. Given again, the command goes on where it stopped: finished runs are kept. Written are
    comparison.json, .md, .tex and .html. If runs fail, the others go on, and the command ends with 7.
    """
    from hfedmoe_ray.comparison.design import read_design, split_items
    from hfedmoe_ray.comparison.record import write_comparison
    from hfedmoe_ray.comparison.running import carry_out

    replaced: dict[str, Any] = {}
    if strategies is not None:
        replaced["strategies"] = list(split_items(strategies))
    if seeds is not None:
        replaced["seeds"] = _seeds(seeds)
    if grids:
        replaced["grid"] = dict(_grid_values(one) for one in grids)
    design = read_design(config, overrides, output=output, replaced=replaced)
    progress = _Progress(design)
    try:
        failures = carry_out(design, processes=processes, show=progress)
    except KeyboardInterrupt:
        progress.clear()
        raise Interrupted(
            f"what is finished is kept in {design.directory}, and what was running goes on from its last round. Give "
            "the same command again."
        ) from None
    progress.clear()
    directory = write_comparison(design, failures)
    click.echo((directory / "comparison.md").read_text(encoding="utf-8"))
    click.echo(f"written: {directory}/comparison.html, .md, .tex and .json")
    if failures:
        first = failures[0]
        raise TrainingError(
            f"{len(failures)} of {len(design.runs)} runs failed and are missing from the tables; give the same command "
            f"again to repeat them alone. The first, {first.run.experiment.name}: {first.reason} (log: {first.log})"
        )


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    wrong = next((part for part in parts if not part.isdecimal()), None)
    if wrong is not None or not parts:
        raise ConfigError(f"--seeds is '{text}'; write whole numbers with commas between them, such as 0,1,2.")
    return [int(part) for part in parts]


def _grid_values(text: str) -> tuple[str, list[Any]]:
    from hfedmoe_ray.comparison.design import split_items
    from hfedmoe_ray.config.load import parse_value

    key, equals, values = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--grid: '{text}' is not a setting. Write key=value,value, such as budget=0.125,0.25.")
    return key.strip(), [parse_value(value, f"'{text}'") for value in split_items(values)]


class _Progress:
    """A line for every run that ends; on a terminal also one, overwritten, of what is running."""

    def __init__(self, design: "Design") -> None:
        self._total = len(design.runs)
        self._ended = 0
        self._running: dict[str, str] = {}
        self._rounds = {run.experiment.name: run.experiment.rounds for run in design.runs}
        self._live = sys.stderr.isatty()
        self._lock = threading.Lock()

    def __call__(self, event: str, run: "Run | None", fields: dict[str, Any]) -> None:
        """See `running.Show`."""
        with self._lock:
            if run is None:
                self._ended = fields["finished"]
                self._say(
                    f"{fields['runs']} of {self._total} runs to do, {fields['processes']} at a time; preparing models "
                    "and data"
                )
                return
            name = run.experiment.name
            if event in ("finished", "failed"):
                self._running.pop(name, None)
                self._ended += event == "finished"
                told = f"in {fields['seconds']:.0f} s" if event == "finished" else f"failed: {fields['reason']}"
                self._say(f"{self._ended}/{self._total}  {name}  {told}")
            else:
                round = fields.get("round", 0)
                self._running[name] = f"{name} {round}/{self._rounds[name]}"
            if self._live and self._running:
                click.echo(f"\r\x1b[2K{'; '.join(self._running.values())}"[:200], nl=False, err=True)

    def clear(self) -> None:
        """Takes the line of what is running away."""
        if self._live:
            click.echo("\r\x1b[2K", nl=False, err=True)

    def _say(self, text: str) -> None:
        self.clear()
        click.echo(text, err=True)
