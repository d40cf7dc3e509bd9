"""The command that draws the papers' figures: `study`."""

from pathlib import Path

import click

from hfedmoe_ray.cli.app import examples
from hfedmoe_ray.errors import ConfigError

_CONFIGS = Path(__file__).parents[2] / "configs"


@click.command(
    short_help="Draw one of the papers' figures from runs of your own.",
    epilog=examples("hfedmoe study --list", "hfedmoe study activation configs/quickstart.yaml rounds=2 --seeds 0"),
)
@click.argument("name", required=False)
@click.argument("settings", nargs=-1, metavar="[CONFIG] [KEY=VALUE]...")
@click.option("--list", "listing", is_flag=True, help="Say what each study shows and costs.")
@click.option("--seeds", metavar="N,N,...", help="Run seeds. Default: the study's own, mostly 0,1,2.")
@click.option("--output", type=click.Path(path_type=Path), default="runs/studies", show_default=True, metavar="DIR")
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    help="Runs at a time; 1: all in this process, for a debugger. Default: as many as fit this machine.",
)
def study(
    name: str | None,
    settings: tuple[str, ...],
    *,
    listing: bool,
    seeds: str | None,
    output: Path,
    processes: int | None,
) -> None:
    """Measure what a figure of the papers shows, on your model, data and budgets.

    CONFIG is the experiment that the study varies; without it, the study's own small one in configs/. DIR gets
    NAME.json, NAME.md and NAME.html. Runs are kept in DIR/runs and not repeated, also by other studies.
    """
    from hfedmoe_ray.config.explain import closest
    from hfedmoe_ray.studies import STUDIES

    if listing or name is None:
        _list()
        return
    if name not in STUDIES:
        raise ConfigError(
            f"There is no study {name!r}.{closest(name, list(STUDIES))} `hfedmoe study --list` says what there is."
        )
    from hfedmoe_ray.studies.page import write_study
    from hfedmoe_ray.studies.study import Setting

    chosen = STUDIES[name]
    config = _own_config(chosen.config) if not settings or "=" in settings[0] else Path(settings[0])
    setting = Setting(
        config=config,
        overrides=tuple(one for one in settings if one != str(config)),
        seeds=chosen.seeds if seeds is None else _seeds(seeds),
        output=output,
        processes=processes,
        tell=lambda line: click.echo(line, err=True),
    )
    findings = chosen.measure(setting)
    click.echo(f"{findings.headline} {findings.paragraph}")
    for path in write_study(chosen, setting, findings):
        click.echo(path)


def _list() -> None:
    from rich.console import Console
    from rich.table import Table

    from hfedmoe_ray.studies import STUDIES

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("study", "shows", "costs, on two cores"):
        table.add_column(heading, no_wrap=heading == "study")
    for one in STUDIES.values():
        table.add_row(one.name, one.shows, one.cost)
    Console(highlight=False).print(table)


def _own_config(file: str) -> Path:
    path = _CONFIGS / file
    if not path.is_file():
        raise ConfigError(
            f"This study's own configuration, configs/{file}, is a part of the repository but not of the installed "
            "package. Give a configuration (hfedmoe study NAME CONFIG), or clone the repository and install from it."
        )
    return path


def _seeds(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) != len(parts):
        raise ConfigError(f"--seeds is {text!r}: write different whole numbers with commas, such as 0,1,2.")
    return tuple(map(int, parts))
