"""The same federated fine-tuning under the newest Flower simulation and here: time, memory, and what survives.

hfedmoe bench peers [--json FILE] [--only timing|chaos] [--rounds 3] [--turns 1]

**What each side was given.** Both train the quickstart's prepared model on its clients: the same examples, batches,
steps, AdamW, clipping and seeds, one thread a client, as many clients at once as there are cores (Flower:
`client_resources` of one CPU). Flower runs its FedAvg over a bare PyTorch loop in which
every expert trains, in a virtual environment of its own (it pins another Ray), made once below the cache directory.
It is started by `run_simulation`: the runtime that `flwr run` starts too, but without the SuperLink's processes, their
memory, and the packing of an app.

**Timing.** Three runs of ours face it: FedAvg with every expert (`same_work_ratio`), the same without the prefix cache
(`same_work_ratio_without_cache`: then both compute the very same layers), and HFedMoE with the quickstart's budgets
(`budgeted_ratio`), which is less work for each client, not the same. Runs take turns; a figure is the median over the
rounds after the first of all turns. What that leaves out of ours: round 0, which profiles clients and fills the prefix
cache and which Flower does not have, and checkpoints, written after a round's time is taken and which Flower does not
write. Memory is the peak over a run of the proportional set sizes of its process and all below it (what is shared, the
object store too, counts once); of turns, the median. `peak_memory_ratio` is that of HFedMoE with budgets over Flower's
full model.

**Chaos.** See `chaos.py`.
"""

import json
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import click
from chaos import chaos
from output import Row, json_option, publish
from processes import Ended, run_to_end
from sides import CONFIG, FLOWER, SOURCES, flower_command, flower_python, our_command, own_ray

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.context import RunContext
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.runtime.machine import this_machine
from hfedmoe_ray.tracking.jsonl import read_lines

FIXED = ("evaluate.every=1000", "evaluate.own=never", "tracking.wandb.mode=disabled")
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
    client_seconds: list[float] = field(default_factory=list)
    """Of these rounds, the sum of what the clients' work took."""
    peak_mib: list[float] = field(default_factory=list)
    """Of each turn."""


def flower_turn(taken: Taken, python: Path, context: RunContext, rounds: int, cores: int) -> dict[str, str]:
    """One simulation; returns the versions it used."""
    # Ray's sockets lie there, and their paths must be short.
    with tempfile.TemporaryDirectory(prefix="peers-", dir="/tmp") as directory:
        place = Path(directory)
        command = flower_command(python, place, context, rounds=rounds, ray=own_ray(place / "ray", cores))
        taken.peak_mib.append(_peak(run_to_end(command, FLOWER, place / "log", LIMIT_S), place / "log"))
        figures = json.loads((place / "result.json").read_text())
    taken.seconds += figures["seconds"][1:]
    taken.client_seconds += figures["client_seconds"][1:]
    _tell("flower", taken)
    versions: dict[str, str] = figures["versions"]
    return versions


def our_turn(taken: Taken, name: str, rounds: int) -> None:
    """One run of ours."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        command = our_command(place, [*FIXED, *OURS[name], f"rounds={rounds}"])
        taken.peak_mib.append(_peak(run_to_end(command, SOURCES, place / "log", LIMIT_S), place / "log"))
        run_dir = place / "quickstart"
        reports = [one for one in read_lines(run_dir / "metrics.jsonl") if one["round"] > 1]
        clients = [one for one in read_lines(run_dir / "events.jsonl") if one["event"] == "client"]
    for report in reports:
        taken.seconds.append(report["seconds"] - report["phases"].get("evaluate", 0.0))
        taken.client_seconds.append(sum(one["seconds"] for one in clients if one["round"] == report["round"]))
    _tell(name, taken)


def _peak(ended: Ended, log: Path) -> float:
    """Peak memory of a run that went well."""
    if ended.code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        how = f"did not end within {LIMIT_S:g} s" if ended.code is None else f"ended with {ended.code}"
        raise click.ClickException(f"A run {how}:\n{tail}")
    return ended.peak_mib


def _tell(name: str, taken: Taken) -> None:
    """One line for each run that has ended: all of them take minutes."""
    rounds = ", ".join(f"{seconds:.1f}" for seconds in taken.seconds)
    click.echo(f"{name}: rounds of {rounds} s, {taken.peak_mib[-1]:.0f} MiB at most", err=True)


@click.command()
@json_option
@click.option("--only", type=click.Choice(["timing", "chaos"]), help="One half of it. Default: both.")
@click.option("--rounds", type=click.IntRange(2), default=3, show_default=True, help="Rounds of a timed run.")
@click.option("--turns", type=click.IntRange(1), default=1, show_default=True, help="Timed runs of each contestant.")
def main(json_file: Path | None, only: str | None, rounds: int, turns: int) -> None:
    """Seconds of a round, memory of all processes, and what becomes of disturbed runs, against Flower."""
    python = flower_python()
    cores = int(this_machine().cpus)
    figures: dict[str, Any] = {"cores": cores}
    rows: list[Row] = []
    if only != "chaos":
        figures |= timing(python, cores, rounds, turns)
        rows += _timing_rows(figures)
    if only != "timing":
        figures["chaos"] = chaos(python, cores)
        rows += [row for one in figures["chaos"] for row in _chaos_rows(one)]
    publish("Against Flower's simulation", figures, rows, json_file)


def timing(python: Path, cores: int, rounds: int, turns: int) -> dict[str, Any]:
    """Figures of runs that take turns."""
    taken = {name: Taken() for name in ("flower", *OURS)}
    versions: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as directory:
        context = prepare_run(load_experiment(CONFIG, list(FIXED)), Path(directory))
    for _ in range(turns):
        versions = flower_turn(taken["flower"], python, context, rounds, cores)
        for name in OURS:
            our_turn(taken[name], name, rounds)
    seconds = {name: median(one.seconds) for name, one in taken.items()}
    peaks = {name: median(one.peak_mib) for name, one in taken.items()}
    return {
        "same_work_ratio": seconds["fedavg"] / seconds["flower"],
        "same_work_ratio_without_cache": seconds["fedavg_no_cache"] / seconds["flower"],
        "budgeted_ratio": seconds["hfedmoe"] / seconds["flower"],
        "peak_memory_ratio": peaks["hfedmoe"] / peaks["flower"],
        "peak_memory_ratio_same_work": peaks["fedavg"] / peaks["flower"],
        "round_s": seconds,
        "peak_mib": peaks,
        "clients_s": {name: median(one.client_seconds) for name, one in taken.items()},
        "rounds_s": {name: one.seconds for name, one in taken.items()},
        "peaks_mib": {name: one.peak_mib for name, one in taken.items()},
        "versions": {"flower": versions, "ours": {name: version(name) for name in versions if name != "flwr"}},
        "rounds": rounds,
        "turns": turns,
    }


def _timing_rows(figures: dict[str, Any]) -> list[Row]:
    rows = []
    for key, what in (
        ("same_work_ratio", "a round of FedAvg, every expert: ours / Flower's"),
        ("same_work_ratio_without_cache", "the same without our prefix cache"),
        ("budgeted_ratio", "a round of ours with budgets / Flower's full model"),
        ("peak_memory_ratio", "peak memory: ours with budgets / Flower's full model"),
        ("peak_memory_ratio_same_work", "peak memory: FedAvg, every expert"),
    ):
        bar, value = BARS.get(key), figures[key]
        asked = "" if bar is None else f"≤ {bar:g}"
        rows.append(Row(what=what, measured=f"{value:.2f}", bar=asked, ok=bar is None or value <= bar))
    for name, seconds in figures["round_s"].items():
        work, peak = figures["clients_s"][name], figures["peak_mib"][name]
        rows.append(Row(what=name, measured=f"{seconds:.1f} s a round, clients' work {work:.1f} s, {peak:.0f} MiB"))
    return rows


def _chaos_rows(row: dict[str, Any]) -> list[Row]:
    """A line per side."""
    return [Row(what=f"{row['fault']}: {side}", measured=_cell(row[side])) for side in ("flower", "ours")]


def _cell(cell: dict[str, Any]) -> str:
    """A cell in a few words."""
    if "at_work" in cell:
        return f"{cell['at_work']} at work"
    how = "ended" if cell["ended"] in (True, [True, True]) else "did not end"
    return f"{how} ({cell['exit_code']}), {cell['results_per_round']} updates a round, {cell['seconds']} s"


if __name__ == "__main__":
    main()
