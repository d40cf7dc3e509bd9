"""What becomes of a run when something goes wrong, under Flower's simulation and here.

Both train a cut-down quickstart (four clients, one layer of four experts, one step a round, every expert, FedAvg, the
same data, batches and seeds), on as many actors as there are cores. In round 2 client 0 misbehaves, once. Where it
never answers, each side has its documented guard set to `GUARD_S`: `timeout` of Flower's `strategy.start`, our
`runtime.deadline_s`. (Their defaults are an hour and ten minutes.) The two sides of a row run at the same time: it is
about faults, not speed. What still runs after three times its undisturbed time, or `LEAST_S` if that is more, is
killed with all that it has started, and counts as not ended.
"""

import json
import re
import secrets
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
import numpy as np
from faults import CLIENT, ROUND, What
from orchestration import AT_ONCE, most_at_once
from processes import Ended, end_family, run_to_end, start, wait
from safetensors.numpy import load_file
from sides import BENCHMARK, CONFIG, FLOWER, PATIENCE_S, SOURCES, flower_command, our_command, own_ray

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.runtime.cluster import connected
from hfedmoe_ray.tracking.jsonl import read_lines
from hfedmoe_ray.types import Array

ROUNDS = 4
GUARD_S, LEAST_S, CALM_S, START_S, POLL_S = 30.0, 75.0, 300.0, 60.0, 0.1
NAP_S = 3.0
"""How long Flower's clients sleep that are counted."""
SMALL = (
    "strategy=fedavg",
    "clients.count=4",
    "data.max_examples=160",
    "data.test_examples=40",
    "data.partition.how=iid",
    "model.upcycle.layers=[5]",
    "model.upcycle.experts=4",
    "model.upcycle.top_k=2",
    "model.upcycle.calibration_steps=0",
    "local.steps=1",
    "local.profile_examples=8",
    "evaluate.every=1000",
    "evaluate.own=never",
    "tracking.wandb.mode=disabled",
    f"rounds={ROUNDS}",
)
FAULTS: Mapping[What, str] = {
    "kill": f"a client's process is killed in round {ROUND}",
    "hang": f"a client never answers in round {ROUND}",
    "half": "an update holds some of the experts only",
    "truncated": f"an update is cut off in round {ROUND}",
}
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a run."""

    ended: bool
    """By itself, in time."""
    exit_code: int | None
    seconds: float
    results_per_round: list[int]
    """Updates that were averaged, of four."""
    said: str
    """What the side itself reports of the fault."""
    model: Mapping[str, Array]
    """The last average; empty where there is none."""
    ended_at: list[float]
    """When each round ended, in seconds since the epoch."""

    def told(self, calm: "Outcome | None" = None) -> dict[str, Any]:
        """The outcome as JSON, compared with the undisturbed run."""
        plain = {
            "ended": self.ended,
            "exit_code": self.exit_code,
            "seconds": round(self.seconds, 1),
            "results_per_round": self.results_per_round,
            "said": self.said,
        }
        return plain if calm is None else plain | {"off_undisturbed": self.off(calm)}

    def off(self, calm: "Outcome") -> float | None:
        """Largest difference of any weight from the undisturbed run's final model; None where it left no such model."""
        if self.exit_code != 0 or not self.model:
            return None
        return max(float(np.abs(self.model[name] - weights).max()) for name, weights in calm.model.items())


class Side(ABC):
    """One of the two."""

    name: str
    python: Path
    environment: Mapping[str, str]

    @abstractmethod
    def command(self, place: Path, address: str | None = None, what: What | None = None) -> list[str]:
        """The command of a run.

        Args:
            place: Directory for all it writes.
            address: Ray cluster to join. Default: its own.
            what: What is to go wrong.
        """

    @abstractmethod
    def outcome(self, ended: Ended, place: Path) -> Outcome:
        """What a run that has ended has left."""

    def run(self, what: What | None, limit_s: float) -> Outcome:
        """One run."""
        with _place() as place:
            return self.outcome(
                run_to_end(self.command(place, what=what), self.environment, place / "log", limit_s), place
            )

    def two_at_once(self, cores: int, limit_s: float, calm: Outcome) -> dict[str, Any]:
        """Two runs on one cluster that belongs to neither, started together, compared with the undisturbed one."""
        # A cluster lets nobody in who does not have its token.
        environment = {**self.environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        with _place() as place:
            script, file = str(BENCHMARK / "shared_cluster.py"), place / "address"
            command = [str(self.python), script, str(cores), str(place / "ray"), str(file)]
            cluster = start(command, environment, place / "log")
            try:
                address = _written(file)
                places = [place / "first", place / "second"]
                for one in places:
                    one.mkdir()
                began = time.monotonic()
                runs = [start(self.command(one, address), environment, one / "log") for one in places]
                try:
                    ended = []
                    for process in runs:
                        code = wait(process, max(0.0, began + limit_s - time.monotonic()))
                        ended.append(Ended(code=code, seconds=time.monotonic() - began, peak_mib=0.0))
                finally:
                    for process in runs:
                        end_family(process)
                first, second = (self.outcome(one, where) for one, where in zip(ended, places, strict=True))
            finally:
                end_family(cluster)
        return {
            "ended": [first.ended, second.ended],
            "exit_code": [first.exit_code, second.exit_code],
            "seconds": round(max(first.seconds, second.seconds), 1),
            "results_per_round": [first.results_per_round, second.results_per_round],
            "said": [first.said, second.said],
            "off_undisturbed": [first.off(calm), second.off(calm)],
            "rounds_beside_each_other": _beside(first.ended_at, second.ended_at),
        }


class FlowerSide(Side):
    """Flower's simulation."""

    name, environment = "flower", FLOWER

    def __init__(self, python: Path, cores: int, scratch: Path) -> None:
        """Prepares what its runs read."""
        self.python, self._cores = python, cores
        self._context = prepare_run(load_experiment(CONFIG, list(SMALL)), scratch)

    def command(self, place: Path, address: str | None = None, what: What | None = None) -> list[str]:
        """See `Side.command`."""
        ray = {"address": address} if address else own_ray(place / "ray", self._cores)
        fault = {"what": what, "file": _armed(place)} if what else None
        patience = GUARD_S if what == "hang" else PATIENCE_S
        return flower_command(
            self.python, place, self._context, rounds=ROUNDS, ray=ray, timeout_s=patience, fault=fault
        )

    def outcome(self, ended: Ended, place: Path) -> Outcome:
        """See `Side.outcome`."""
        file = place / "result.json"
        record = json.loads(file.read_text()) if file.is_file() else {}
        errors = record.get("errors", [])
        return Outcome(
            ended=ended.code is not None,
            exit_code=ended.code,
            seconds=ended.seconds,
            results_per_round=record.get("results_per_round", []),
            said=_last_line(place) if ended.code else (errors or _counted(place))[0],
            model=dict(np.load(model)) if (model := file.with_suffix(".npz")).is_file() else {},
            ended_at=record.get("ended_at", []),
        )

    def most_at_once(self) -> int:
        """The most clients that were at work at the same instant, of `AT_ONCE`."""
        with _place() as place:
            script, result = str(BENCHMARK / "flower" / "at_once.py"), place / "result.json"
            numbers = (str(AT_ONCE), str(NAP_S), str(self._cores))
            command = [str(self.python), script, *numbers, str(place / "ray"), str(result)]
            if run_to_end(command, FLOWER, place / "log", CALM_S).code != 0:
                raise click.ClickException(f"Flower's sleeping clients: {_last_line(place)}")
            return int(json.loads(result.read_text())["at_once"])


class OurSide(Side):
    """This framework."""

    name, python, environment = "ours", Path(sys.executable), SOURCES

    def command(self, place: Path, address: str | None = None, what: What | None = None) -> list[str]:
        """See `Side.command`. With budgets an update of `half` the experts is what a client is asked for."""
        keys = [*SMALL, f"runtime.address={address}"] if address else list(SMALL)
        if what == "hang":
            keys.append(f"runtime.deadline_s={GUARD_S:g}")
        if what is None:
            return our_command(place, keys)
        if what == "half":
            return our_command(place, [*keys, "strategy=hfedmoe"])
        script, run_dir = str(BENCHMARK / "faulty.py"), str(place / "quickstart")
        return [sys.executable, script, what, _armed(place), run_dir, *keys]

    def outcome(self, ended: Ended, place: Path) -> Outcome:
        """See `Side.outcome`."""
        run_dir = place / "quickstart"
        events, latest = read_lines(run_dir / "events.jsonl"), run_dir / "checkpoints" / "LATEST"
        rounds = [one for one in read_lines(run_dir / "metrics.jsonl") if one["round"] > 0]
        arrived = [one["round"] for one in events if one["event"] == "client" and one["status"] == "ok"]
        reasons = [one["reason"] for one in events if one.get("client") == CLIENT and one.get("reason")]
        return Outcome(
            ended=ended.code is not None,
            exit_code=ended.code,
            seconds=ended.seconds,
            results_per_round=[arrived.count(one["round"]) for one in rounds],
            said=_last_line(place) if ended.code else (reasons or [""])[0],
            model=_weights(latest.with_name(latest.read_text().strip())) if latest.is_file() else {},
            ended_at=[datetime.fromisoformat(one["time"]).timestamp() for one in rounds],
        )


def chaos(python: Path, cores: int) -> list[dict[str, Any]]:
    """The table: a row per fault, a cell per side.

    Args:
        python: Interpreter of Flower's environment.
        cores: Of this machine.
    """
    with _place() as scratch:
        flower = FlowerSide(python, cores, scratch)
    sides: tuple[Side, Side] = (flower, OurSide())
    calm = _on_both(sides, lambda side: side.run(None, CALM_S))
    limits = {name: max(LEAST_S, 3 * outcome.seconds) for name, outcome in calm.items()}
    rows = [_row("none", {name: outcome.told() for name, outcome in calm.items()})]
    for what, told in FAULTS.items():
        disturbed = _on_both(sides, partial(_disturbed, what, limits))
        rows.append(_row(told, {name: outcome.told(calm[name]) for name, outcome in disturbed.items()}))
    shared = _on_both(sides, lambda side: side.two_at_once(cores, limits[side.name], calm[side.name]))
    rows.append(_row("two runs at once on one Ray cluster", shared))
    with connected(None):
        ours = most_at_once()
    at_work = {"flower": {"at_work": flower.most_at_once()}, "ours": {"at_work": ours}}
    return [*rows, _row(f"{AT_ONCE} clients at once", at_work)]


def _disturbed(what: What, limits: Mapping[str, float], side: Side) -> Outcome:
    return side.run(what, limits[side.name])


def _on_both(sides: Sequence[Side], do: Callable[[Side], Result]) -> dict[str, Result]:
    """What a function returns for each side, both at the same time."""
    with ThreadPoolExecutor(len(sides)) as threads:
        return dict(zip([side.name for side in sides], threads.map(do, sides), strict=True))


def _row(fault: str, cells: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A row; told at once, since all of them take minutes."""
    row = {"fault": fault} | dict(cells)
    click.echo(json.dumps(row), err=True)
    return row


@contextmanager
def _place() -> Iterator[Path]:
    """A directory for a run. Ray's sockets lie below, and their paths must be short."""
    with tempfile.TemporaryDirectory(prefix="peers-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        yield Path(directory)


def _armed(place: Path) -> str:
    """The file that is there until the fault has happened."""
    file = place / "fault"
    file.touch()
    return str(file)


def _written(file: Path) -> str:
    """What a process that was started writes into a file."""
    until = time.monotonic() + START_S
    while not file.is_file():
        if time.monotonic() > until:
            raise click.ClickException(f"No Ray cluster within {START_S:g} s.")
        time.sleep(POLL_S)
    return file.read_text()


def _weights(checkpoint: Path) -> dict[str, Array]:
    """The model in a checkpoint of ours."""
    tensors = load_file(checkpoint / "state.safetensors")
    return {name: value for name, value in tensors.items() if name.startswith("global/")}


def _counted(place: Path) -> list[str]:
    """What Flower logs of the replies in the round of the fault; [""] where it did not get that far."""
    log = (place / "log").read_text(errors="replace")
    return [*re.findall(r"Received \d+ results and \d+ failures", log)[ROUND - 1 : ROUND], ""]


def _last_line(place: Path) -> str:
    """The last line that a run printed."""
    lines = [line.strip() for line in (place / "log").read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def _beside(first: list[float], second: list[float]) -> int:
    """How many rounds of each run, at least, ended before the other's last one."""
    if not first or not second:
        return 0
    return min(sum(moment < second[-1] for moment in first), sum(moment < first[-1] for moment in second))
