"""A run of ours in which one client misbehaves: faulty.py WHAT FILE RUN_DIRECTORY [KEY=VALUE]...

It is `hfedmoe run` with another worker, and with the round loop in this process instead of the server's actor.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import click
from faults import Fault, What
from sides import CONFIG

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.context import RunContext
from hfedmoe_ray.errors import HFedMoEError
from hfedmoe_ray.federation.executor import Executor
from hfedmoe_ray.runtime.cluster import connected
from hfedmoe_ray.runtime.federate import federate
from hfedmoe_ray.runtime.pool import RayExecutor
from hfedmoe_ray.runtime.worker import client_worker
from hfedmoe_ray.types import ClientTask, TaskWeights


class FaultyWorker:
    """Serves clients as every worker does, but for the fault."""

    def __init__(self, fault: Fault, context: RunContext, frozen: Mapping[str, Any] | None = None) -> None:
        """Loads what a worker loads."""
        self._fault = fault
        self._worker = client_worker(context, frozen)

    def execute(
        self, task: ClientTask, weights: TaskWeights, should_stop: Callable[[], bool]
    ) -> tuple[bytes, bytes, bytes]:
        """Runs one task, or does not."""
        due = task.kind == "train" and self._fault.due(task.client, task.round)
        if due:
            self._fault.strike()
        payload, metrics, state = self._worker.execute(task, weights, should_stop)
        if due and self._fault.what == "truncated":
            payload = payload[: len(payload) // 2]
        return payload, metrics, state


def main(what: What, file: Path, run_dir: Path, keys: list[str]) -> int:
    """Runs to the end, whatever that is; returns the exit code of `hfedmoe run`."""

    def executor(context: RunContext) -> Executor:
        return RayExecutor(context, worker_factory=partial(FaultyWorker, Fault(what=what, file=file)))

    try:
        with connected(None):
            federate(
                load_experiment(CONFIG, keys),
                run_dir,
                resume=False,
                make_executor=executor,
                render=lambda _name, _fields: None,
                should_stop=lambda: False,
            )
    except HFedMoEError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(cast(What, sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
