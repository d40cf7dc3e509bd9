"""Going on from where a run of a study ended, in this process, without adding to its record."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.tracking.record import RunRecord

if TYPE_CHECKING:
    from hfedmoe_ray.federation.rounds import Federation


@contextmanager
def continued(run: RunRecord) -> Iterator["Federation"]:
    """A server with the state of a run's last checkpoint, its weights published; nothing it does is saved or told."""
    from hfedmoe_ray.federation.rounds import Federation
    from hfedmoe_ray.prepare import prepare_run
    from hfedmoe_ray.runtime.local import LocalExecutor
    from hfedmoe_ray.tracking.tracker import Trackers

    context = prepare_run(load_experiment(run.run_dir / "config.yaml"), run.run_dir)
    executor = LocalExecutor(context)
    try:
        federation = Federation(context, executor, Trackers([]), resume=True)
        executor.publish(federation.state.weights)
        yield federation
    finally:
        executor.close()
