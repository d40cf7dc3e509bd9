"""The command that measures what a run trained: `evaluate`."""

import json
from pathlib import Path

import click

from hfedmoe_ray.cli.app import examples
from hfedmoe_ray.cli.running import RUN_DIR


@click.command(
    short_help="Evaluate what a run trained, again or on other data.",
    epilog=examples("hfedmoe evaluate runs/quickstart", "hfedmoe evaluate runs/quickstart data.test=more.jsonl --own"),
)
@click.argument("run_dir", metavar="RUN", type=RUN_DIR)
@click.argument("data", nargs=-1, metavar="[data.KEY=VALUE]...")
@click.option("--round", "number", type=click.IntRange(min=0), help="After which round. Default: the last one.")
@click.option("--own", is_flag=True, help="Also each client's share of the model on the client's own test split.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON, with every client's accuracy.")
def evaluate(run_dir: Path, data: tuple[str, ...], *, number: int | None, own: bool, as_json: bool) -> None:
    """Evaluate a run's model as it stood after a round, in this process; nothing of the run is changed.

    RUN is its directory, such as runs/quickstart. Keys below `data` name other texts.
    """
    from hfedmoe_ray.evaluate import evaluate_run
    from hfedmoe_ray.federation.evaluation import worst_tenth
    from hfedmoe_ray.rundir import check_is_run
    from hfedmoe_ray.tracking.benchmarks import measures
    from hfedmoe_ray.tracking.formatting import decimal, percent

    check_is_run(run_dir)
    round_, found = evaluate_run(run_dir, round=number, own=own, data=data)
    if as_json:
        clients = {str(client): accuracy for client, accuracy in found.own.items()}
        answered = {name: score.fields for name, score in found.benchmarks.items()}
        told = {"round": round_, "accuracy": found.accuracy, "loss": found.loss, "own": clients, "benchmarks": answered}
        if found.backdoor is not None:
            told["backdoor"] = found.backdoor
        click.echo(json.dumps(told))
        return
    click.echo(f"round {round_}: test {percent(found.accuracy)}, loss {decimal(found.loss)}")
    if found.backdoor is not None:
        click.echo(f"backdoor {percent(found.backdoor)} of the other labels' texts, with the trigger, get its target")
    for name, score in found.benchmarks.items():
        values = ", ".join(f"{measure} {value}" for measure, value in measures(score.fields).items())
        click.echo(f"{name} {values.removeprefix('accuracy ')} ({score.items} items)")
    if found.own:
        worst = worst_tenth(found.own)
        click.echo(f"own {percent(found.own_accuracy)} over {len(found.own)} clients, worst tenth {percent(worst)}")
