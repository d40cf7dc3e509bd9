"""How many Flower clients are at work at the same time.

at_once.py CLIENTS NAP_SECONDS CPUS RAY_DIRECTORY RESULT

Clients do nothing but sleep, and tell when they began and ended. Each asks for so little of a CPU that the simulation
makes one actor a client.
"""

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation


class Watched(FedAvg):  # type: ignore[misc]
    """FedAvg that remembers when its clients worked."""

    def __init__(self, clients: int) -> None:
        """Takes every client, and evaluates none."""
        super().__init__(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        self.spans: list[tuple[float, float]] = []

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Takes their times down."""
        answers = list(replies)
        self.spans += [(one.content["metrics"]["began"], one.content["metrics"]["ended"]) for one in answers]
        averaged: tuple[ArrayRecord | None, MetricRecord | None] = super().aggregate_train(server_round, answers)
        return averaged


def main(clients: int, nap_s: float, cpus: int, ray_directory: str, result: Path) -> None:
    """One round; writes the most clients that were at work at the same instant."""
    strategy, server, app = Watched(clients), ServerApp(), ClientApp()

    def train(message: Message, context: Context) -> Message:
        del context
        began = time.time()
        time.sleep(nap_s)
        metrics = MetricRecord({"num-examples": 1, "began": began, "ended": time.time()})
        return Message(content=RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)

    def serve(grid: Grid, context: Context) -> None:
        del context
        strategy.start(grid=grid, initial_arrays=ArrayRecord({"router": Array(np.zeros((2, 8)))}), num_rounds=1)

    app.train()(train)
    server.main()(serve)
    run_simulation(
        server_app=server,
        client_app=app,
        num_supernodes=clients,
        backend_config={
            "init_args": {"address": "local", "num_cpus": cpus, "_temp_dir": ray_directory},
            "client_resources": {"num_cpus": cpus / clients, "num_gpus": 0.0},
        },
    )
    at_once = max(sum(start <= moment < end for start, end in strategy.spans) for moment, _ in strategy.spans)
    result.write_text(json.dumps({"at_once": at_once, "answered": len(strategy.spans)}))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4], Path(sys.argv[5]))
