"""FedAvg under Flower's simulation, in Flower's own environment: writes the seconds of every round as JSON.

server.py ROUNDS CPUS RAY_DIRECTORY RESULT
"""

import json
import sys
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from client import client_app, expert_name, run_context
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from hfedmoe_ray.moe.prepare import initial_weights


class TimedFedAvg(FedAvg):  # type: ignore[misc]
    """Flower's FedAvg with a clock: a round lasts from its configuration to its average, ours from plan to report."""

    def __init__(self, clients: int) -> None:
        """Takes every client in every round, and evaluates none."""
        super().__init__(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        self.seconds: list[float] = []
        self.replies: list[int] = []
        """Clients whose update arrived, by round."""
        self._started = 0.0

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
        self.seconds.append(time.perf_counter() - self._started)
        self.replies.append(sum(not answer.has_error() for answer in answers))
        return averaged


def main(rounds: int, cpus: int, ray_directory: str, result: Path) -> None:
    """Runs the simulation with one CPU a client, so that as many train at once as there are cores."""
    run = run_context()
    weights = initial_weights(run.model, run.experiment.model.trainable, None, run.experiment.seed)
    named = dict(weights.shared)
    for key, tensors in weights.experts.items():
        named |= {expert_name(key, name): array for name, array in tensors.items()}
    strategy = TimedFedAvg(run.experiment.clients.count)
    app = ServerApp()

    def serve(grid: Grid, context: Context) -> None:
        del context
        arrays = ArrayRecord({name: Array(array) for name, array in named.items()})
        strategy.start(grid=grid, initial_arrays=arrays, num_rounds=rounds)

    app.main()(serve)
    run_simulation(
        server_app=app,
        client_app=client_app(),
        num_supernodes=run.experiment.clients.count,
        backend_config={
            "init_args": {"address": "local", "num_cpus": cpus, "_temp_dir": ray_directory},
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        },
    )
    versions = {name: version(name) for name in ("flwr", "ray", "torch", "transformers")}
    figures = {"seconds": strategy.seconds, "replies": strategy.replies, "versions": versions}
    result.write_text(json.dumps(figures))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
