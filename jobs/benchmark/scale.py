"""Hundreds of clients on this one machine: memory of all processes, seconds of a round, and of changing clients.

hfedmoe bench scale [--json FILE] [--rounds 4]

The quickstart on Ray with 50 and with 500 clients of its three tiers, 20 a round, each round training for real. A
round with ten times as many registered clients has as much to do, so it should take as long.
"""

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import click
from output import Row, json_option, publish
from processes import peak_of_tree

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.records import ClientRecord, RoundReport
from hfedmoe_ray.runtime import session

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
FEW, MANY, COHORT = 50, 500, 20
FIXED = (
    f"clients.per_round={COHORT}",
    "data.max_examples=null",
    "local.profile_examples=8",
    "evaluate.every=1000",
    "evaluate.own=never",
    "tracking.wandb.mode=disabled",
)
MEMORY_MIB, GROWTH, REBIND_MS = 8192, 1.2, 200
"""The bars: all processes, a round of 500 over one of 50, and what a slot needs beside the steps to change clients."""


class Rounds:
    """What the training rounds of a run took."""

    def __init__(self) -> None:
        """Starts empty."""
        self.seconds: list[float] = []
        self.clients: list[ClientRecord] = []

    def __call__(self, name: str, fields: Any) -> None:
        """Follows a run (see `federate.Render`)."""
        if name == "round" and isinstance(fields, RoundReport) and fields.round > 0:
            self.seconds.append(fields.seconds - fields.phases.get("evaluate", 0.0))
            self.clients += [record for record in fields.clients if record.status == "ok"]


def run(clients: int, rounds: int) -> tuple[Rounds, float]:
    """Runs the quickstart with so many clients; returns its rounds and the peak of all processes in MiB."""
    followed = Rounds()
    experiment = load_experiment(CONFIG, [*FIXED, f"clients.count={clients}", f"rounds={rounds}"])
    with tempfile.TemporaryDirectory() as directory, peak_of_tree() as peak:
        session.run(experiment, Path(directory), resume=False, render=followed)
    return followed, peak[0]


@click.command()
@json_option
@click.option("--rounds", default=4, show_default=True, help="Training rounds, of which the median is told.")
def main(json_file: Path | None, rounds: int) -> None:
    """Memory and seconds of rounds with 50 and 500 clients on this machine."""
    few, _ = run(FEW, rounds)
    many, peak = run(MANY, rounds)
    few_s, many_s = median(few.seconds), median(many.seconds)
    rebind = 1000 * median(record.seconds - record.step_seconds for record in many.clients)
    figures = {"peak_total_mib": peak, "round_s_50": few_s, "round_s_500": many_s, "rebind_ms": rebind}
    rows = [
        Row(
            what=f"all processes together, {MANY} clients",
            measured=f"{peak:.0f} MiB",
            bar=f"≤ {MEMORY_MIB}",
            ok=peak <= MEMORY_MIB,
        ),
        Row(what=f"a round of {COHORT} of {FEW} clients", measured=f"{few_s:.1f} s"),
        Row(
            what=f"a round of {COHORT} of {MANY} clients",
            measured=f"{many_s:.1f} s, {many_s / few_s:.2f} times as long",
            bar=f"≤ {GROWTH} times",
            ok=many_s <= GROWTH * few_s,
        ),
        Row(
            what="a task beside its optimizer steps",
            measured=f"{rebind:.0f} ms",
            bar=f"≤ {REBIND_MS}",
            ok=rebind <= REBIND_MS,
        ),
    ]
    publish(f"{MANY} clients on one machine, {rounds} rounds of {COHORT}", figures, rows, json_file)


if __name__ == "__main__":
    main()
