"""Running an experiment from a driver: in this process, or by a server actor that this process watches."""

from pathlib import Path
from typing import Any

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import ClusterError
from hfedmoe_ray.runtime.federate import Render, federate
from hfedmoe_ray.tracking.destinations import check_destinations

STOPPING = "stopping after this round, to be resumed; press Ctrl-C again to stop at once"


def run(experiment: Experiment, run_dir: Path, *, resume: bool, render: Render) -> dict[str, Any]:
    """Runs an experiment, or what is left of it, and returns its summary.

    Args:
        experiment: What to run, and with `backend`, where.
        run_dir: Where its record and checkpoints are.
        resume: Continue from the last checkpoint.
        render: Told in this process, and in order, what happens.

    Raises:
        HFedMoEError: the run could not start or could not go on.
        KeyboardInterrupt: Ctrl-C; the last checkpoint is complete.
    """
    check_destinations(experiment.tracking)
    if experiment.backend == "ray":
        return _run_on_ray(experiment, run_dir.resolve(), resume, render)
    from hfedmoe_ray.runtime.local import LocalExecutor

    return federate(
        experiment,
        run_dir.resolve(),
        resume=resume,
        make_executor=LocalExecutor,
        render=render,
        should_stop=lambda: False,
    )


def _run_on_ray(experiment: Experiment, run_dir: Path, resume: bool, render: Render) -> dict[str, Any]:
    import ray
    from ray.exceptions import RayActorError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from hfedmoe_ray.runtime import timeouts
    from hfedmoe_ray.runtime.cluster import connected
    from hfedmoe_ray.runtime.server import Outcome, RemoteServer, forwarded_environment

    def follow(cursor: int) -> int:
        """Renders news until there are no more, or Ctrl-C; returns the number of the next one."""
        try:
            while True:
                news, last = ray.get(server.progress.remote(cursor), timeout=timeouts.PROGRESS)
                for name, fields in news:
                    cursor += 1
                    render(name, fields)
                if last:
                    return cursor
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted.append(True)
            render("warning", {"message": STOPPING})
            server.stop.remote()
            return follow(cursor)

    interrupted: list[bool] = []
    with connected(experiment.runtime.address):
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        server = RemoteServer.options(name=f"{experiment.name}-server", scheduling_strategy=here).remote(
            experiment, run_dir, resume, forwarded_environment()
        )
        ended = server.run.remote()
        try:
            follow(0)
            outcome: Outcome = ray.get(ended, timeout=timeouts.SERVER_STOP)
        except RayActorError as error:
            raise ClusterError(
                f"The server process of the run died: {str(error).splitlines()[0]} The last checkpoint is complete: "
                f"hfedmoe resume {run_dir}"
            ) from error
        except RayError as error:
            raise ClusterError(f"The server process of the run cannot be reached: {error}") from error
        summary = outcome.result()
        if interrupted:
            raise KeyboardInterrupt
        return summary
