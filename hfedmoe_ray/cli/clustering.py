"""The command that writes what starts a cluster: `cluster render`."""

from collections.abc import Iterable
from pathlib import Path

import click

from hfedmoe_ray.cli.app import examples, experiment_arguments
from hfedmoe_ray.errors import ConfigError

PROVIDERS = ("local", "aws", "gcp", "kuberay", "rayjob", "slurm", "docker")
STDOUT = "-"


_EXAMPLES = examples(
    "hfedmoe cluster render configs/cluster.yaml --provider kuberay",
    "hfedmoe cluster render configs/cluster.yaml --provider aws --gpu --registry registry.example/me --out .",
    "hfedmoe cluster render configs/cluster.yaml --out cluster  # what the repository holds",
)


@click.group(epilog=_EXAMPLES)
def cluster() -> None:
    """Make a Ray cluster that fits an experiment."""


@cluster.command(short_help="Write the files that start a cluster for an experiment.", epilog=_EXAMPLES)
@experiment_arguments
@click.option(
    "--provider",
    "providers",
    type=click.Choice(PROVIDERS),
    multiple=True,
    help="Whose files; may be given several times. Default: all.",
)
@click.option("--out", metavar="DIR", default=STDOUT, show_default=True, help="Directory to write to; -: show them.")
@click.option("--gpu", is_flag=True, help="Nodes of clients have GPUs, and `device` is of those.")
@click.option(
    "--clients-per-node",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Client actors a CPU node is made for, each with a core; a GPU node takes what its GPU holds.",
)
@click.option(
    "--min-nodes",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Nodes of a tier that stay when nothing runs, where something scales the cluster.",
)
@click.option("--registry", default="", metavar="PREFIX", help="What goes before the image's name.")
@click.option(
    "--host", "hosts", multiple=True, metavar="GROUP=ADDRESS,...", help="local: machines of a group, head included."
)
def render(
    config: Path,
    overrides: tuple[str, ...],
    *,
    providers: tuple[str, ...],
    out: str,
    gpu: bool,
    clients_per_node: int,
    min_nodes: int,
    registry: str,
    hosts: tuple[str, ...],
) -> None:
    """Write the files that start a Ray cluster on which an experiment's clients can train at once.

    Every tier gets nodes of its own, with its labels; the server gets one, and the head offers nothing. Sizes follow
    from the tiers' budgets, versions from the checkout.
    """
    from hfedmoe_ray.clusters.design import design_cluster
    from hfedmoe_ray.clusters.pins import read_pins
    from hfedmoe_ray.clusters.render import Request
    from hfedmoe_ray.clusters.render import render as rendered
    from hfedmoe_ray.config.load import load_experiment

    experiment = load_experiment(config, overrides)
    request = Request(
        name=experiment.name,
        config=config,
        overrides=overrides,
        design=design_cluster(experiment, gpus=gpu, clients_per_node=clients_per_node, min_nodes=min_nodes),
        pins=read_pins(registry),
        hosts=_by_group(hosts),
    )
    for provider in providers or PROVIDERS:
        for path, text in rendered(provider, request).items():
            if out == STDOUT:
                click.echo(text, nl=False)
                continue
            file = Path(out) / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            click.echo(file)


def _by_group(hosts: Iterable[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for one in hosts:
        group, equals, addresses = one.partition("=")
        if not equals or not all(addresses.split(",")):
            raise ConfigError(f"--host is {one!r}: write GROUP=ADDRESS,ADDRESS, such as server=10.0.0.2.")
        found.setdefault(group, []).extend(addresses.split(","))
    return found
