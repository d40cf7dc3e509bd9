"""Thousands of registered clients of which a round asks a few: does a run cost more for those it does not ask?

hfedmoe bench registered [--json FILE] [--repeats 5] [--rounds 6]

The same data are dealt to 100 and to 10 000 clients, 4 a round, and runs of the two take turns in this process
(`backend: local`, so that no start of Ray hides anything) with a model so small that little else takes time. The data
are prepared before: a start is what comes between the command and the first task. Told are the quickest start and
report, and the median round.
"""

import io
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import click
import model
from output import Row, json_option, publish
from rich.console import Console

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.runtime import session
from hfedmoe_ray.tracking.console import ConsoleRenderer
from hfedmoe_ray.tracking.report import write_report

FEW, MANY, COHORT = 100, 10_000, 4
EXAMPLES = 8 * MANY
"""As many a client as a partition gives at least by default."""
GROWTH = 1.2
"""The bar: what a start, and a round, of many may take over one of few."""
SIZES = model.SIZES | {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


class Watch:
    """When things happened in a run, seen as its terminal sees it."""

    def __init__(self, run_dir: Path) -> None:
        """Starts the clock."""
        self._screen = ConsoleRenderer(run_dir, Console(file=io.StringIO(), width=120))
        self._began = time.perf_counter()
        self.start_s = 0.0
        self.rounds_s: list[float] = []
        """Of training rounds, each until the next begins; so that of the last one is not among them."""
        self._last = (-1, 0.0)

    def __call__(self, name: str, fields: Any) -> None:
        """Follows a run (see `federate.Render`)."""
        now = time.perf_counter()
        if name == "task_started" and not self.start_s:
            self.start_s = now - self._began
        if name == "round_started":
            number, since = self._last
            if number > 0:
                self.rounds_s.append(now - since)
            self._last = (fields["round"], now)
        self._screen(name, fields)


def experiment(clients: int, rounds: int) -> Experiment:
    """The quickstart's tiers with a tiny model and so many clients."""
    tiers = [
        {"name": "phone", "share": 0.5, "experts": 0.25, "device": 0.1},
        {"name": "server", "share": 0.5, "experts": 0.5, "device": 0.5},
    ]
    keys = {
        "name": f"registered-{clients}",
        "backend": "local",
        "rounds": rounds,
        "clients": {"count": clients, "per_round": COHORT, "tiers": tiers},
        "model": {"source": str(model.random_mixtral(SIZES)), "trainable": "top"},
        "data": {
            "source": str(model.random_texts(EXAMPLES, 8)),
            "max_length": 12,
            "partition": {"how": "iid"},
            "own_test": 0.0,
            "test_examples": 16,
        },
        "local": {"steps": 2, "batch_size": 2, "profile_examples": 2, "cache": "off"},
        "evaluate": {"every": 1000, "own": "never"},
        "tracking": {"wandb": {"mode": "disabled"}},
    }
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "registered.yaml"
        file.write_text(json.dumps(keys))  # JSON is YAML
        return load_experiment(file)


def run(made: Experiment) -> tuple[Watch, float]:
    """Runs it; returns what was watched, and the seconds of its report."""
    with tempfile.TemporaryDirectory() as directory:
        run_dir = Path(directory)
        watch = Watch(run_dir)
        session.run(made, run_dir, resume=False, render=watch)
        began = time.perf_counter()
        write_report(run_dir)
        return watch, time.perf_counter() - began


@click.command()
@json_option
@click.option("--repeats", default=5, show_default=True, help="Runs of each kind.")
@click.option("--rounds", default=6, show_default=True, help="Training rounds of a run.")
def main(json_file: Path | None, repeats: int, rounds: int) -> None:
    """Seconds until a run's first task, and of a round, with 100 and with 10 000 registered clients."""
    made = {clients: experiment(clients, rounds) for clients in (FEW, MANY)}
    for one in made.values():
        prepare_run(one, Path("unused"))
    runs: dict[int, list[tuple[Watch, float]]] = {FEW: [], MANY: []}
    run(made[FEW])  # imports, and fills caches
    for _ in range(repeats):
        for clients, one in made.items():
            runs[clients].append(run(one))
    figures: dict[str, float] = {}
    for clients, watched in runs.items():
        # The quickest: a run has one start, and whatever else the machine does only adds to it.
        figures[f"start_s_{clients}"] = min(watch.start_s for watch, _ in watched)
        figures[f"round_s_{clients}"] = median(seconds for watch, _ in watched for seconds in watch.rounds_s)
        figures[f"report_s_{clients}"] = min(seconds for _, seconds in watched)
    rows = [
        _row(figures, "start", "until the first task", GROWTH),
        _row(figures, "round", f"a round of {COHORT}", GROWTH),
        _row(figures, "report", "the report", None),
    ]
    publish(f"{MANY} registered clients against {FEW}, {COHORT} a round", figures, rows, json_file)


def _row(figures: dict[str, float], what: str, told: str, bar: float | None) -> Row:
    few, many = figures[f"{what}_s_{FEW}"], figures[f"{what}_s_{MANY}"]
    measured = f"{few:.3f} s and {many:.3f} s: {many / few:.2f} times as long"
    if bar is None:
        return Row(what=told, measured=measured)
    return Row(what=told, measured=measured, bar=f"≤ {bar:g} times", ok=many <= bar * few)


if __name__ == "__main__":
    main()
