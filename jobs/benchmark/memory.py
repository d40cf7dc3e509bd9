"""What a client's process occupies while it trains, by its share of the experts, as the operating system counts it.

    hfedmoe bench memory [--json FILE]

Clients are the actors of a real run. This process reads /proc/PID/smaps_rollup of each while it trains; unique memory
is what would be freed if the process ended (private pages, clean and dirty). From a client's peak its own unique memory
when it had loaded the model but not yet served a task, an idle actor, is taken off.
"""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import model
from output import Row, json_option, publish

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.errors import TrainingError
from hfedmoe_ray.moe.prepare import initial_weights
from hfedmoe_ray.runtime.cluster import connected
from hfedmoe_ray.runtime.pool import RayExecutor
from hfedmoe_ray.types import ClientTask, ExpertPlan, ModelShape, Role

SAMPLE_S = 0.05
SMALL = 0.125
CLIENTS, AT_A_TIME = 10, 2


def unique_mib(pid: int) -> float:
    """Unique memory of a process in MiB: its private pages."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean:", "Private_Dirty:"))) / 1024


class Watched:
    """Summed unique memory of some processes above what they had at first."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = tuple(pids)
        self._idle = self._sum()
        self.peak = 0.0

    def sample(self) -> None:
        """Raises `peak` to what is occupied now."""
        self.peak = max(self.peak, self._sum() - self._idle)

    def _sum(self) -> float:
        return sum(map(unique_mib, self._pids))


@contextmanager
def watched(pids: Sequence[int]) -> Iterator[Watched]:
    """Samples from a thread of this process while the block runs."""
    memory, over = Watched(pids), threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_S):
            memory.sample()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield memory
    finally:
        over.set()
        thread.join()


class Clients:
    """One live actor per client of an experiment."""

    def __init__(self, context: RunContext) -> None:
        self._shape = context.model.shape
        self._executor = RayExecutor(context)
        self._executor.publish(initial_weights(context.model, context.experiment.model.trainable))
        # The pool looks for what an actor answers when it runs tasks; here it is needed before.
        self.pids = [slot.loading().pid for slot in self._executor.slots]

    def train(self, clients: Sequence[int], share: float) -> None:
        """One training task for each of these clients, all at once; each holds that share of the experts."""
        tasks = [_task(self._shape, client, share) for client in clients]
        for result in self._executor.run(tasks, lambda *_: None):
            if result.status != "ok" or result.payload is None:
                raise TrainingError(f"client {result.task.client} {result.status}: {result.reason}")
            result.payload()

    def close(self) -> None:
        """Ends the actors."""
        self._executor.close()


@contextmanager
def live_clients(context: RunContext) -> Iterator[Clients]:
    """Starts the clients' actors, loaded and idle; ends them with the block. Ray must be connected."""
    clients = Clients(context)
    try:
        yield clients
    finally:
        clients.close()


def _task(shape: ModelShape, client: int, share: float) -> ClientTask:
    """A client that trains the first experts of every layer."""
    held = round(share * shape.experts)
    row = tuple(Role.TRAIN if expert < held else Role.ABSENT for expert in range(shape.experts))
    plan = ExpertPlan(roles=(row,) * shape.layers, absent="mean")
    return ClientTask(kind="train", round=1, client=client, seed=0, plan=plan, version=0)


def measure(steps: int, batch: int) -> dict[str, Any]:
    """Returns the figures, in MiB."""
    settings = ("actors=dedicated", f"local.steps={steps}", f"local.batch_size={batch}")
    alone = model.prepared(*settings, f"clients.count={len(model.SHARES)}")
    one_tier = f"clients.tiers={json.dumps([model.tier(SMALL, 1.0)])}"
    together = model.prepared(*settings, f"clients.count={CLIENTS}", one_tier)
    with connected(None):
        with live_clients(alone) as clients:
            private = {str(share): _alone(clients, client, share) for client, share in enumerate(model.SHARES)}
        with live_clients(together) as clients:
            node = _together(clients)
    return {"full_private_mib": private["1.0"], "private_mib": private, "node_private_mib_10_clients": node}


def _alone(clients: Clients, client: int, share: float) -> float:
    """Peak of one client, on its first task."""
    with watched([clients.pids[client]]) as memory:
        clients.train([client], share)
    return memory.peak


def _together(clients: Clients) -> float:
    """Peak of the sum over ten resident clients while all of them train, a few at a time."""
    with watched(clients.pids) as memory:
        for first in range(0, CLIENTS, AT_A_TIME):
            clients.train(range(first, first + AT_A_TIME), SMALL)
    return memory.peak


def _rows(figures: Mapping[str, Any]) -> list[Row]:
    full, private, node = (figures[key] for key in ("full_private_mib", "private_mib", "node_private_mib_10_clients"))
    bars = {"0.25": 0.40, "0.125": 0.28}
    rows = []
    for share in model.SHARES:
        ratio = private[str(share)] / full
        bar = bars.get(str(share))
        rows.append(
            Row(
                what=f"a client with {100 * share:g} % of the experts",
                measured=f"{private[str(share)]:.0f} MiB, {ratio:.3f} of full",
                bar="" if bar is None else f"≤ {bar:.2f}",
                ok=bar is None or ratio <= bar,
            )
        )
    what = f"{CLIENTS} resident clients of {100 * SMALL:g} %, {AT_A_TIME} training at a time"
    measured = f"{node:.0f} MiB, {node / full:.3f} of full"
    return [*rows, Row(what=what, measured=measured, bar="≤ 2.00", ok=node <= 2 * full)]


@click.command()
@click.option("--steps", default=3, show_default=True, help="Optimizer steps of each client.")
@click.option("--batch", default=8, show_default=True, help="Examples in a batch, of 64 tokens.")
@json_option
def main(steps: int, batch: int, json_file: Path | None) -> None:
    """Private memory of a client by its share of the experts."""
    figures = measure(steps, batch)
    publish("Private memory above an idle actor", figures, _rows(figures), json_file)


if __name__ == "__main__":
    main()
