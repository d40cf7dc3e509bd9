"""Commands that look before anything runs: `plan`, `validate`, `doctor`."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hfedmoe_ray.cli.app import examples, experiment_arguments

if TYPE_CHECKING:
    from rich.table import Table

    from hfedmoe_ray.config.schema import Experiment
    from hfedmoe_ray.plan import Plan
    from hfedmoe_ray.types import ModelShape

ROWS_BY_CLIENT = 30
"""Up to so many clients, `plan` gives each a row; beyond, each tier."""


@click.command(
    epilog=examples(
        "hfedmoe plan configs/quickstart.yaml",
        "hfedmoe plan configs/quickstart.yaml clients.count=500 --cpus 64 --gpus 8 --memory-gib 512",
    )
)
@experiment_arguments
@click.option("--cpus", type=click.FloatRange(min=0, min_open=True), help="Plan for so many CPU cores.")
@click.option("--gpus", type=click.IntRange(min=0), help="Plan for so many GPUs.")
@click.option("--memory-gib", type=click.FloatRange(min=0, min_open=True), help="Plan for so much memory for clients.")
@click.option(
    "--measure", is_flag=True, help="Train a few steps here first, so that memory is not estimated, and time is told."
)
def plan(
    config: Path,
    overrides: tuple[str, ...],
    *,
    cpus: float | None,
    gpus: int | None,
    memory_gib: float | None,
    measure: bool,
) -> None:
    """Show who gets what, whether it fits this machine, and what it costs.

    Nothing is started. Memory is estimated from how long the texts are, where data and tokenizer are on this machine;
    elsewhere every text counts as long as `data.max_length` allows, which makes it an upper bound. With --cpus, --gpus
    and --memory-gib the plan is made for another machine. With --measure the model and data are prepared and a small
    client trains for half a minute; later plans remember what it occupied and how long it took.
    """
    from rich.console import Console

    from hfedmoe_ray.config.load import load_experiment
    from hfedmoe_ray.moe.shape import read_shape
    from hfedmoe_ray.packing import GIB
    from hfedmoe_ray.plan import plan_experiment
    from hfedmoe_ray.runtime.machine import this_machine
    from hfedmoe_ray.sampled_lengths import sampled_lengths, why_unknown

    experiment = load_experiment(config, overrides)
    shape = read_shape(experiment.model)
    machine = this_machine()
    machine = replace(
        machine,
        cpus=machine.cpus if cpus is None else cpus,
        gpus=machine.gpus if gpus is None else gpus,
        memory_bytes=machine.memory_bytes if memory_gib is None else int(memory_gib * GIB),
    )
    if measure:
        _measure(experiment, gpu=machine.gpus > 0)
    unknown = why_unknown(experiment)
    made = plan_experiment(experiment, shape, [machine], None if unknown else sampled_lengths(experiment))
    # On a narrow terminal a row wraps, rather than lose its numbers.
    console = Console(highlight=False, soft_wrap=True, width=max(Console().width, 120))
    console.print(_plan_table(made, shape))
    for line in _plan_lines(made, experiment, unknown):
        console.print(line)
    if experiment.privacy.central is not None:
        from hfedmoe_ray.trust.accounting import told

        console.print(told(experiment))


def _measure(experiment: "Experiment", *, gpu: bool) -> None:
    from hfedmoe_ray.prepare import prepare_run
    from hfedmoe_ray.train.calibrate import calibrate

    click.echo("measuring what training occupies", err=True)
    calibrate(prepare_run(experiment, Path(experiment.output)), gpu=gpu)


def _plan_table(plan: "Plan", shape: "ModelShape") -> "Table":
    from rich.table import Table

    from hfedmoe_ray.tracking.formatting import size

    by_client = sum(len(one.clients) for one in plan.tiers) <= ROWS_BY_CLIENT
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("client" if by_client else "clients", "tier", "Ray resources"):
        table.add_column(heading, no_wrap=True)
    for heading in ("experts", "a batch", "memory", "down", "up"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [
        (min(clients), str(clients[0]) if by_client else str(len(clients)), one)
        for one in plan.tiers
        for clients in ([(client,) for client in one.clients] if by_client else [one.clients])
    ]
    for _, clients, one in sorted(rows, key=lambda row: row[0]):
        frozen = f" + {one.present - one.resident} frozen" if one.present > one.resident else ""
        held = f"{one.resident}{frozen} of {shape.total_experts}"
        traffic = (size(one.bytes_down), size(one.bytes_up))
        table.add_row(clients, one.tier, str(one.asked), held, str(one.batch), size(one.memory_bytes), *traffic)
    return table


def _plan_lines(plan: "Plan", experiment: "Experiment", unknown: str) -> list[str]:
    """What is told below the table; `unknown` says why it is not known how long the texts are."""
    from hfedmoe_ray.tracking.formatting import duration, plural, size

    machine = plan.nodes[0]
    offered = f"{machine.name}: {machine.cpus:g} CPU, {machine.gpus} GPU, {size(machine.memory_bytes)} for clients"
    slots = Counter(str(slot.resources) for slot in plan.slots)
    actors = ", ".join(f"{count} x ({asked})" for asked, count in slots.items()) or "clients run in this one process"
    total = plan.round_down + plan.round_up
    if all(one.measured for one in plan.tiers):
        source = "measured on this machine"
    elif unknown:
        source = f"at most, as if every text had {experiment.data.max_length} tokens ({unknown}); --measure it"
    else:
        source = "estimated from how long the texts are; --measure it"
    rounds, cohort = experiment.rounds, experiment.round_size
    shared = max(one.shared_bytes for one in plan.tiers)
    once = [f"each GPU holds {size(shared)} of frozen weights besides, once for all its clients"] if shared else []
    how_long = "" if plan.seconds is None else f"about {duration(plan.seconds)} of training at this machine's speed, "
    return [
        "",
        "(experts held, and trained in a batch; the process's own memory at its peak; bytes a round, up at most)",
        f"memory: {source}; a client that runs out of it gets fewer examples at once, then fewer experts",
        *once,
        "",
        offered,
        f"it fits: {plural(len(plan.slots), 'client actor')} at once: {actors}" if plan.slots else f"it fits: {actors}",
        f"a round of {plural(cohort, 'client')}: {plural(plan.waves, 'wave')}, {how_long}{size(plan.round_down)} down, "
        f"{size(plan.round_up)} up; "
        f"{plural(rounds, 'round')}: {size(rounds * total)}",
    ]


@click.command(epilog=examples("hfedmoe validate configs/quickstart.yaml data.partition.how=iid"))
@experiment_arguments
def validate(config: Path, overrides: tuple[str, ...]) -> None:
    """Check a configuration, its data and its model, without training."""
    from hfedmoe_ray.config.load import load_experiment
    from hfedmoe_ray.validate import check_sources

    experiment = load_experiment(config, overrides)
    for fact in check_sources(experiment):
        click.echo(fact)
    if experiment.privacy.central is not None:
        from hfedmoe_ray.trust.accounting import told

        click.echo(told(experiment))
    click.echo(f"{config} is valid; what it needs is shown by: hfedmoe plan {config}")


@click.command(
    epilog=examples("hfedmoe doctor", "hfedmoe doctor configs/quickstart.yaml", "hfedmoe doctor --address auto")
)
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--address", metavar="ADDRESS", help="Also examine the Ray cluster there: host:port, auto, or its URL.")
def doctor(config: Path | None, overrides: tuple[str, ...], address: str | None) -> int:
    """Examine this machine: each finding with its remedy.

    With CONFIG also whether that experiment's clients, and its model's weights, find room. On a node of a cluster,
    --address auto examines all of its nodes; from elsewhere, its dashboard's URL tells whether it takes jobs from here.
    """
    from rich.console import Console

    from hfedmoe_ray.config.load import load_experiment
    from hfedmoe_ray.doctor import examine

    experiment = load_experiment(config, overrides) if config else None

    console = Console(highlight=False, soft_wrap=True)
    colours = {"ok": "green", "note": "yellow", "problem": "bold red"}
    problems = 0
    for finding in examine(address, experiment):
        problems += finding.level == "problem"
        console.print(f"[{colours[finding.level]}]{finding.level:>7}[/]  {finding.what}")
        if finding.remedy:
            console.print(f"         {finding.remedy}", style="dim")
    console.print("no problems" if not problems else f"problems: {problems}")
    return 1 if problems else 0
