"""What `hfedmoe plan` says a client's process will need of memory, against what one is seen to need, tier by tier.

    hfedmoe bench prediction [CONFIG [key=value ...]] [--json FILE]

For every tier of every experiment a client with the tier's experts trains a round in a fresh process, after having been
profiled and evaluated as in a run, and the kernel's peak of its own memory is compared with the arithmetic, which is
told how long the texts really are. Without CONFIG: the quickstart, the same by LoRA on experts and attention, and a
random language model of 117 million parameters by LoRA and by QLoRA (int8).
"""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import model
from output import Row, json_option, publish

from hfedmoe_ray.budget import tier_of
from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.config.schema import Tier
from hfedmoe_ray.context import RunContext, cache_dir
from hfedmoe_ray.data.lengths import typical_lengths
from hfedmoe_ray.plan import Forecast, forecast
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.train.calibrate import train_once
from hfedmoe_ray.train.environment import inherited

BAR = 0.15
STEPS = 6
"""Optimizer steps: from the second on everything is alive together; memory still grows a little for some more."""
WRITES = ("model.task=causal", "data.prompt=label", "data.response=text", "model.trainable=experts")
ADAPTED = ("model.trainable=experts", "model.lora={rank: 8, attention: true}")
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
TIERS = [model.tier(share, 0.5) for share in (0.25, 1.0)]


def experiments(config: Path | None, overrides: tuple[str, ...]) -> Iterator[tuple[str, RunContext]]:
    """Name and prepared run of everything that is measured."""
    directory = cache_dir() / "benchmark" / "run"
    if config is not None:
        yield config.stem, prepare_run(load_experiment(config, overrides), directory)
        return
    for name, changes in (("quickstart", ()), ("quickstart, LoRA", ADAPTED)):
        yield name, prepare_run(load_experiment(QUICKSTART, changes), directory)
    tiers = f"clients.tiers={TIERS}".replace("'", '"')
    for name, lora in (("LoRA", "{rank: 8}"), ("QLoRA", "{rank: 8, base: int8, attention: true}")):
        keys = (*WRITES, tiers, f"model.lora={lora}", "local.batch_size=16")
        yield f"random Mixtral, {name}", model.prepared(*keys, writes=True)


def seen(context: RunContext, tier: Tier) -> float:
    """Peak of a client's own memory in MiB, in a process of its own."""
    with inherited(), ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(train_once, context, tier, STEPS).result()


def _row(name: str, one: Forecast, peak: float) -> tuple[Row, dict[str, Any]]:
    predicted = one.memory_bytes / 2**20
    off = predicted / peak - 1
    figures = {"tier": one.tier, "experts": one.resident, "predicted_mib": predicted, "peak_mib": peak, "off": off}
    row = Row(
        what=f"{name}, {one.tier}: {one.resident} experts",
        measured=f"{peak:.0f} MiB; predicted {predicted:.0f}, {off:+.0%}",
        bar=f"± {BAR:.0%}",
        ok=abs(off) <= BAR,
    )
    return row, {"experiment": name, **figures}


@click.command()
@click.argument("config", required=False, type=click.Path(exists=True, path_type=Path))
@click.argument("overrides", nargs=-1)
@json_option
def main(config: Path | None, overrides: tuple[str, ...], json_file: Path | None) -> None:
    """Predicted against measured memory of a client, by tier."""
    found: list[tuple[Row, dict[str, Any]]] = []
    for name, context in experiments(config, overrides):
        tiers = {tier.name: tier for tier in tier_of(context.experiment.clients)}
        lengths = typical_lengths(context)
        said = forecast(context.experiment, context.model.shape, gpus_available=False, lengths=lengths, measured=False)
        found += [_row(name, one, seen(context, tiers[one.tier])) for one in said]
    figures = {"clients": [one for _, one in found]}
    publish("Memory of a client that trains", figures, [row for row, _ in found], json_file)


if __name__ == "__main__":
    main()
