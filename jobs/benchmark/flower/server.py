"""FedAvg under Flower's simulation, in Flower's own environment.

server.py REQUEST: that is a JSON file (see `Request`). What is known of the run is written after each round, so that
it is there whatever becomes of the rest.
"""

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from client import client_app, expert_name, run_context
from faults import Fault
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from hfedmoe_ray.moe.prepare import initial_weights


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run."""

    context: Path
    """The pickled `RunContext`."""
    result: Path
    """JSON file for what is known; the last average lies beside it, as .npz."""
    rounds: int
    ray: dict[str, Any]
    """Arguments of `ray.init`."""
    timeout_s: float
    """Seconds a round waits for its clients."""
    fault: Fault | None

    @staticmethod
    def read(path: Path) -> "Request":
        """Reads one."""
        given = json.loads(path.read_text())
        fault = given.pop("fault")
        context, result = Path(given.pop("context")), Path(given.pop("result"))
        made = Fault(what=fault["what"], file=Path(fault["file"])) if fault else None
        return Request(context=context, result=result, fault=made, **given)


class TimedFedAvg(FedAvg):  # type: ignore[misc]
    """Flower's FedAvg with a clock: a round lasts from its configuration to its average, ours from plan to report."""

    def __init__(self, clients: int, result: Path) -> None:
        """Takes every client in every round, and evaluates none."""
        super().__init__(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        self._result = result
        self._started = 0.0
        self._figures: dict[str, Any] = {
            "versions": {name: version(name) for name in ("flwr", "ray", "torch", "transformers")},
            "seconds": [],
            "client_seconds": [],
            "results_per_round": [],
            "errors": [],
            "ended_at": [],
        }

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Starts the clock."""
        self._started = time.perf_counter()
        messages: Iterable[Message] = super().configure_train(server_round, arrays, config, grid)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Stops it."""
        answers = list(replies)
        averaged: tuple[ArrayRecord | None, MetricRecord | None] = super().aggregate_train(server_round, answers)
        self._figures["seconds"].append(time.perf_counter() - self._started)
        self._figures["ended_at"].append(time.time())
        self._figures["results_per_round"].append(sum(not answer.has_error() for answer in answers))
        taken = [answer.content["metrics"]["seconds"] for answer in answers if not answer.has_error()]
        self._figures["client_seconds"].append(sum(taken))
        reasons = [answer.error.reason for answer in answers if answer.has_error()]
        self._figures["errors"] += [f"round {server_round}: {' '.join(reason.split())[:200]}" for reason in reasons]
        if averaged[0] is not None:
            np.savez(self._result.with_suffix(".npz"), **{name: array.numpy() for name, array in averaged[0].items()})
        self._result.write_text(json.dumps(self._figures))
        return averaged


def main(request: Request) -> None:
    """Runs the simulation with one CPU a client, so that as many train at once as there are cores."""
    run = run_context(request.context)
    weights = initial_weights(run.model, run.experiment.model.trainable, None, run.experiment.seed)
    named = dict(weights.shared)
    for key, tensors in weights.experts.items():
        named |= {expert_name(key, name): array for name, array in tensors.items()}
    strategy = TimedFedAvg(run.experiment.clients.count, request.result)
    app = ServerApp()

    def serve(grid: Grid, context: Context) -> None:
        del context
        arrays = ArrayRecord({name: Array(array) for name, array in named.items()})
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=request.rounds, timeout=request.timeout_s)

    app.main()(serve)
    run_simulation(
        server_app=app,
        client_app=client_app(request.context, request.fault),
        num_supernodes=run.experiment.clients.count,
        backend_config={"init_args": request.ray, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )


if __name__ == "__main__":
    main(Request.read(Path(sys.argv[1])))
