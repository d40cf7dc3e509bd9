"""Commands that run experiments, here or on a cluster, and use what they left: `run`, `resume`, `export` and others."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import click

from hfedmoe_ray.cli.app import Interrupted, examples, experiment_arguments
from hfedmoe_ray.errors import ConfigError, TrainingError

RUN_DIR = click.Path(path_type=Path)


@click.command(
    epilog=examples(
        "hfedmoe run configs/quickstart.yaml",
        "hfedmoe run configs/quickstart.yaml rounds=4 clients.tiers.0.experts=0.25 name=tighter",
        "hfedmoe run configs/quickstart.yaml strategy=random --overwrite",
    )
)
@experiment_arguments
@click.option("--overwrite", is_flag=True, help="Delete an earlier run of the same name first.")
def run(config: Path, overrides: tuple[str, ...], overwrite: bool) -> None:
    """Run an experiment; its record is written to runs/NAME/."""
    from hfedmoe_ray.config.load import load_experiment
    from hfedmoe_ray.library import federate

    experiment = load_experiment(config, overrides)
    with _told(Path(experiment.output) / experiment.name):
        federate(experiment, overwrite=overwrite)


@click.command(short_help="Go on with an interrupted run.", epilog=examples("hfedmoe resume runs/quickstart"))
@click.argument("run_dir", metavar="RUN", type=RUN_DIR)
def resume(run_dir: Path) -> None:
    """Go on with an interrupted run from its last complete round.

    RUN is its directory, such as runs/quickstart. The result is the one the run would have had undisturbed.
    """
    from hfedmoe_ray.library import resume

    with _told(run_dir):
        resume(run_dir)


@contextmanager
def _told(run_dir: Path) -> Iterator[None]:
    """Says where a run's report is when it has ended, and makes of Ctrl-C a message that says how to go on."""
    from hfedmoe_ray.rundir import how_to_go_on

    report, interrupted = run_dir / "report.html", False
    try:
        yield
    except KeyboardInterrupt:
        interrupted = True
    if report.is_file():
        click.echo(f"report: {report}")
    if interrupted:
        raise Interrupted(how_to_go_on(run_dir))


@click.command(
    short_help="Run the last rounds of a run again, and compare.",
    epilog=examples("hfedmoe verify runs/quickstart --backend local"),
)
@click.argument("run_dir", metavar="RUN", type=RUN_DIR)
@click.option("--rounds", type=click.IntRange(min=1), default=2, show_default=True, help="Rounds to run again.")
@click.option("--backend", type=click.Choice(["local", "ray"]), help="Where. Default: where the run was.")
def verify(run_dir: Path, rounds: int, backend: str | None) -> None:
    """Run the last rounds of a run again from its checkpoints, and compare every bit of what they leave.

    Nothing of the run is changed. Fails with 7 where something came out otherwise.
    """
    from hfedmoe_ray.rundir import check_is_run
    from hfedmoe_ray.tracking.console import ConsoleRenderer
    from hfedmoe_ray.verify import verify_run

    check_is_run(run_dir)
    with ConsoleRenderer(run_dir) as render:
        verified = verify_run(run_dir, rounds=rounds, backend=backend, render=render)
    for one in verified:
        verdict = "the same to the last bit" if not one.different else f"{len(one.different)} differ"
        click.echo(f"round {one.round}: {one.tensors} tensors, {verdict}")
    different = [one for one in verified if one.different]
    if different:
        few = ", ".join(different[0].different[:3])
        raise TrainingError(
            f"Round {different[0].round} of {run_dir} came out otherwise when it was run again; first in: {few}. "
            "Either library versions differ from those in its config.yaml, or threads or devices do, or it is a bug."
        )


@click.command(epilog=examples("hfedmoe report runs/quickstart runs/tighter"))
@click.argument("run_dirs", metavar="RUN...", nargs=-1, required=True, type=RUN_DIR)
def report(run_dirs: tuple[Path, ...]) -> None:
    """Write report.html of one or more runs, finished or not."""
    from hfedmoe_ray.rundir import check_is_run
    from hfedmoe_ray.tracking.report import write_report

    for run_dir in run_dirs:
        check_is_run(run_dir)
        click.echo(write_report(run_dir))


@click.command(
    short_help="Write what a run trained for transformers or peft.",
    epilog=examples(
        "hfedmoe export runs/quickstart",
        "hfedmoe export runs/lora --format peft --merge --output adapter",
        "hfedmoe export runs/lora --dtype bf16 --output merged",
        "hfedmoe export runs/lora --format peft --push OWNER/NAME",
    ),
)
@click.argument("run_dir", metavar="RUN", type=RUN_DIR)
@click.option(
    "--format",
    "form",
    type=click.Choice(["hf", "peft"]),
    default="hf",
    show_default=True,
    help="hf: the whole model, LoRA factors merged. peft: the factors as an adapter, and under base/ its base model.",
)
@click.option("--merge", is_flag=True, help="Of a LoRA run: the merged model too. hf is that; peft has it in merged/.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="What the model, or the base of an adapter, is rounded to; bf16 takes half of the room.",
)
@click.option("--output", type=RUN_DIR, help="Where to write. Default: RUN/exported/FORMAT.")
@click.option(
    "--push", metavar="OWNER/NAME", help="Then upload it to this repository of the hub; a new one is private."
)
@click.option("--public", is_flag=True, help="With --push: a new repository can be read by everyone.")
def export(
    run_dir: Path,
    *,
    form: Literal["hf", "peft"],
    merge: bool,
    dtype: Literal["fp32", "bf16"],
    output: Path | None,
    push: str | None,
    public: bool,
) -> None:
    """Write what a run had trained at its last complete round for transformers or peft.

    Private weights of clients (strategy local) are not part of it. Fails with 8 where there is no complete round, with
    2 where the run trained whole experts and --format peft or --merge is given, or --push has no token, and with 4
    where the hub does not take it.
    """
    from hfedmoe_ray import hub
    from hfedmoe_ray.export import export_run
    from hfedmoe_ray.rundir import check_is_run

    check_is_run(run_dir)
    if public and push is None:
        raise ConfigError("--public says who may read what is pushed: give --push OWNER/NAME too, or leave it out.")
    if push is not None:
        hub.check_can_push(push)
    directory = output or run_dir / "exported" / form
    export_run(run_dir, form, directory, merge=merge, dtype=dtype)
    click.echo(directory)
    if push is not None:
        click.echo(hub.push(directory, push, public=public))


@click.command(
    short_help="Run an experiment on a Ray cluster, as a job.",
    epilog=examples("hfedmoe submit configs/quickstart.yaml --address http://head:8265"),
)
@experiment_arguments
@click.option("--address", metavar="URL", help="Dashboard of the cluster. Default: $RAY_API_SERVER_ADDRESS, else here.")
@click.option("--no-follow", is_flag=True, help="Return at once instead of showing the log and fetching the results.")
@click.option("--overwrite", is_flag=True, help="Delete an earlier run of the same name first, there and here.")
def submit(config: Path, overrides: tuple[str, ...], address: str | None, no_follow: bool, overwrite: bool) -> int:
    """Run an experiment on a Ray cluster, as a job; its log is shown, its record fetched to runs/NAME/.

    This package and the configuration are uploaded; the cluster's own environment is used.
    """
    from hfedmoe_ray.runtime import jobs

    return jobs.submit(config, overrides, address, follow=not no_follow, overwrite=overwrite)
