"""Runs every strategy of a comparison over seeds and settings, and prints the table.

python jobs/compare.py configs/compare_20news.yaml [--seeds 0,1,2] [--alphas 0.1,0.3] [--processes 2]

Finished runs are kept in runs/<name>/<run>/ and not repeated: an interrupted comparison continues.
"""

import itertools
import json
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.runtime import session

PLACEMENTS = {
    "all experts, batch selection (the paper's)": "strategy.resident=all",
    "others frozen": "strategy.unselected=frozen",
    "others absent: mean": "strategy.unselected=mean",
    "others absent: drop": "strategy.unselected=drop",
    "others absent: re-route": "strategy.unselected=reroute",
}
VARIANTS: dict[tuple[str, str], tuple[str, ...]] = {
    (name, placement): (f"strategy={name}", override)
    for placement, override in PLACEMENTS.items()
    for name in ("hfedmoe", "random")
}
VARIANTS["fedavg", "every expert, no budget"] = ("strategy=fedavg",)


def run_one(config: str, output: Path, name: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Runs one experiment, or reads its summary if it has been run."""
    summary = output / name / "summary.json"
    if not summary.exists():
        experiment = load_experiment(Path(config), [f"name={name}", *overrides])
        session.run(experiment, output / name, resume=False, render=lambda *_: None)
    result: dict[str, Any] = json.loads(summary.read_text())
    return result


def spread(values: list[float]) -> str:
    """Mean and standard deviation in percent."""
    return f"{100 * mean(values):.1f} ± {100 * (stdev(values) if len(values) > 1 else 0):.1f}"


@click.command()
@click.argument("config")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--alphas", default="0.1,0.3", show_default=True)
@click.option("--processes", default=2, show_default=True, help="Runs at a time, one thread each.")
def main(config: str, seeds: str, alphas: str, processes: int) -> None:
    """Compares strategies on equal terms."""
    base = load_experiment(Path(config), [])
    output = Path(base.output) / base.name
    found: dict[tuple[tuple[str, str], str], list[dict[str, Any]]] = {}
    with ProcessPoolExecutor(processes) as pool:
        futures = {}
        for (variant, overrides), alpha, seed in itertools.product(
            VARIANTS.items(), alphas.split(","), seeds.split(",")
        ):
            setting = overrides[-1].split("=")[-1]
            name = f"{variant[0]}-{setting}-alpha{alpha}-seed{seed}"
            job = pool.submit(
                run_one, config, output, name, (*overrides, f"seed={seed}", f"data.partition.alpha={alpha}")
            )
            futures[job] = (variant, alpha)
        for job in as_completed(futures):
            found.setdefault(futures[job], []).append(job.result())
            click.echo(f"{sum(map(len, found.values()))}/{len(futures)} {job.result()['name']}", err=True)
    columns = [f"α = {alpha}: {what}" for alpha in alphas.split(",") for what in ("global", "own")]
    click.echo("| experts not selected | strategy | " + " | ".join(columns) + " |")
    click.echo("|---|---|" + "---|" * len(columns))
    for strategy, setting in VARIANTS:
        cells = [
            spread([run[key] for run in found[(strategy, setting), alpha]])
            for alpha in alphas.split(",")
            for key in ("accuracy", "own_accuracy")
        ]
        click.echo(f"| {setting} | {strategy} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
