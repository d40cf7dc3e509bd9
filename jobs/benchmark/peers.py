"""The same federated fine-tuning under the newest Flower simulation and here: seconds of a round, memory of it all.

hfedmoe bench peers [--json FILE] [--rounds 3] [--turns 2]

Both train the quickstart's prepared model on its clients: the same examples, batches, steps, AdamW, clipping
and one thread a client, as many clients at once as there are cores. Flower runs FedAvg over a bare PyTorch loop in
which every expert trains, in a virtual environment of its own (it pins another Ray), made once below the cache
directory. Here three runs face it: FedAvg with every expert (`same_work_ratio`), the same without the prefix cache
(`same_work_ratio_without_prefix_cache`: then both compute the very same layers), and HFedMoE with the quickstart's
budgets (`budgeted_ratio`), which is less work for each client, not the same. Runs take turns; a figure is the median
over the rounds after the first of all turns. What that leaves out of ours: round 0, which profiles clients and fills
the prefix cache and which Flower does not have, and checkpoints, written after a round's time is taken and which Flower
does not write.

Memory is the peak over a run of the proportional set sizes of its process and all below it; of turns, the median.
`peak_memory_ratio` is that of HFedMoE with budgets over Flower's full model.
"""

import json
import os
import pickle
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import click
from output import Row, json_option, publish
from processes import peak_of_tree

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.context import cache_dir
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.runtime.machine import this_machine

REPOSITORY = Path(__file__).parents[2]
CONFIG = REPOSITORY / "configs" / "quickstart.yaml"
FIXED = ("evaluate.every=1000", "evaluate.own=never", "tracking.wandb.mode=disabled")
PINNED = ("torch", "transformers", "safetensors", "numpy", "tokenizers")
"""What computes is the same version on both sides."""
PACKAGES = ("flwr[simulation]", "torch", "transformers", "safetensors", "pyyaml", "pydantic")
OURS = {
    "fedavg": ("strategy=fedavg",),
    "fedavg_no_cache": ("strategy=fedavg", "local.cache=off"),
    "hfedmoe": (),
}
BARS = {"same_work_ratio": 0.8, "budgeted_ratio": 0.5, "peak_memory_ratio": 0.5}
LIMIT_S = 1800.0
"""A run that takes longer is ended."""


@dataclass
class Taken:
    """What the turns of one contestant took."""

    seconds: list[float] = field(default_factory=list)
    """Of each round after the first."""
    peak_mib: list[float] = field(default_factory=list)
    """Of each turn."""


def flower_python() -> Path:
    """The interpreter of Flower's environment, which is made if it is not there."""
    directory = cache_dir().resolve() / "benchmark" / "flower-venv"
    python, constraints = directory / "bin" / "python", directory / "constraints.txt"
    lines = (REPOSITORY / "constraints-cpu.txt").read_text().splitlines()
    pins = "\n".join(line for line in lines if line.partition("==")[0] in PINNED) + "\n"
    if constraints.is_file() and constraints.read_text() == pins:
        return python
    subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    # Written under its own name only when all is installed: an interrupted attempt is made again.
    draft = directory / "constraints.draft"
    draft.write_text(pins)
    install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(draft), *PACKAGES]
    subprocess.run(install, check=True)
    draft.rename(constraints)
    return python


def measured(command: list[str], environment: dict[str, str], log: Path) -> float:
    """Runs a command to its end; returns the peak memory of its processes in MiB."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, env=os.environ | environment, stdout=file, stderr=file)
        with peak_of_tree(process.pid) as peak:
            try:
                code = process.wait(timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait()
                raise
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise click.ClickException(f"{command[0]} ended with {code}:\n{tail}")
    return peak[0]


def flower_turn(taken: Taken, python: Path, context: Path, rounds: int, cores: int) -> dict[str, str]:
    """One simulation; returns the versions it used."""
    environment = {
        "PYTHONPATH": str(REPOSITORY),
        "PEERS_CONTEXT": str(context),
        "OMP_NUM_THREADS": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    # Ray's sockets lie there, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="peers-", dir="/tmp") as directory:
        result = Path(directory) / "result.json"
        script = REPOSITORY / "jobs" / "benchmark" / "flower" / "server.py"
        command = [str(python), str(script), str(rounds), str(cores), f"{directory}/ray", str(result)]
        taken.peak_mib.append(measured(command, environment, Path(directory) / "log"))
        figures = json.loads(result.read_text())
    taken.seconds += figures["seconds"][1:]
    _tell("flower", taken)
    versions: dict[str, str] = figures["versions"]
    return versions


def our_turn(taken: Taken, name: str, rounds: int) -> None:
    """One run of ours."""
    with tempfile.TemporaryDirectory() as directory:
        keys = [*FIXED, *OURS[name], f"rounds={rounds}", f"name={name.replace('_', '-')}", f"output={directory}"]
        command = [sys.executable, "-m", "hfedmoe_ray.cli", "run", str(CONFIG), *keys]
        taken.peak_mib.append(measured(command, {}, Path(directory) / "log"))
        (metrics,) = Path(directory).glob("*/metrics.jsonl")
        reports = [json.loads(line) for line in metrics.read_text().splitlines()]
    taken.seconds += [one["seconds"] - one["phases"].get("evaluate", 0.0) for one in reports if one["round"] > 1]
    _tell(name, taken)


def _tell(name: str, taken: Taken) -> None:
    """One line for each run that has ended: all of them take minutes."""
    rounds = ", ".join(f"{seconds:.1f}" for seconds in taken.seconds)
    click.echo(f"{name}: rounds of {rounds} s, {taken.peak_mib[-1]:.0f} MiB at most", err=True)


@click.command()
@json_option
@click.option("--rounds", type=click.IntRange(2), default=3, show_default=True, help="Rounds of a run.")
@click.option("--turns", type=click.IntRange(1), default=2, show_default=True, help="Runs of each contestant.")
def main(json_file: Path | None, rounds: int, turns: int) -> None:
    """Seconds of a round and memory of all processes, against Flower."""
    python = flower_python()
    cores = int(this_machine().cpus)
    taken = {name: Taken() for name in ("flower", *OURS)}
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as directory:
        context = Path(directory) / "context"
        context.write_bytes(pickle.dumps(prepare_run(load_experiment(CONFIG, list(FIXED)), Path(directory) / "run")))
        for _ in range(turns):
            versions = flower_turn(taken["flower"], python, context, rounds, cores)
            for name in OURS:
                our_turn(taken[name], name, rounds)
    figures = _figures(taken) | {"flower_versions": versions, "rounds": rounds, "turns": turns, "cores": cores}
    publish(f"Against Flower {versions['flwr']}, ten clients a round", figures, _rows(figures), json_file)


def _figures(taken: dict[str, Taken]) -> dict[str, Any]:
    seconds = {name: median(one.seconds) for name, one in taken.items()}
    peaks = {name: median(one.peak_mib) for name, one in taken.items()}
    return {
        "same_work_ratio": seconds["fedavg"] / seconds["flower"],
        "same_work_ratio_without_prefix_cache": seconds["fedavg_no_cache"] / seconds["flower"],
        "budgeted_ratio": seconds["hfedmoe"] / seconds["flower"],
        "peak_memory_ratio": peaks["hfedmoe"] / peaks["flower"],
        "peak_memory_ratio_same_work": peaks["fedavg"] / peaks["flower"],
        "round_s": seconds,
        "peak_mib": peaks,
        "rounds_s": {name: one.seconds for name, one in taken.items()},
    }


def _rows(figures: dict[str, Any]) -> list[Row]:
    rows = []
    for key, what in (
        ("same_work_ratio", "a round of FedAvg, every expert: ours / Flower's"),
        ("same_work_ratio_without_prefix_cache", "the same without our prefix cache"),
        ("budgeted_ratio", "a round of ours with budgets / Flower's full model"),
        ("peak_memory_ratio", "peak memory: ours with budgets / Flower's full model"),
        ("peak_memory_ratio_same_work", "peak memory: FedAvg, every expert"),
    ):
        bar, value = BARS.get(key), figures[key]
        asked = "" if bar is None else f"≤ {bar:g}"
        rows.append(Row(what=what, measured=f"{value:.2f}", bar=asked, ok=bar is None or value <= bar))
    for name, seconds in figures["round_s"].items():
        rows.append(Row(what=name, measured=f"{seconds:.1f} s, {figures['peak_mib'][name]:.0f} MiB"))
    return rows


if __name__ == "__main__":
    main()
