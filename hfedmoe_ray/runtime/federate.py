"""A whole run in one process, given where its clients run: prepare, train, record. Free of Ray."""

import errno
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.context import RunContext
from hfedmoe_ray.errors import CheckpointError
from hfedmoe_ray.federation.executor import Executor
from hfedmoe_ray.records import RoundReport
from hfedmoe_ray.tracking.destinations import destinations
from hfedmoe_ray.tracking.files import FileTracker
from hfedmoe_ray.tracking.tracker import Tracker, Trackers
from hfedmoe_ray.train.environment import quick_imports
from hfedmoe_ray.train.memory import return_freed_memory

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What writing to a full disk, or beyond a quota or limit, ends with."""
Render = Callable[[str, Any], None]
"""Shows what happens: "start" {"config", "facts"}, "round" `RoundReport`, "finish" summary, else an event's fields."""


def federate(
    experiment: Experiment,
    run_dir: Path,
    *,
    resume: bool,
    make_executor: Callable[[RunContext], Executor],
    render: Render,
    should_stop: Callable[[], bool],
    further: Sequence[Tracker] = (),
) -> dict[str, Any]:
    """Prepares and runs an experiment, or what is left of it; returns its summary.

    Args:
        experiment: What to run.
        run_dir: Where its record and checkpoints are.
        resume: Continue from the last checkpoint.
        make_executor: Makes what runs the clients.
        render: Told what happens.
        should_stop: Asked between rounds.
        further: Trackers besides those that the configuration asks for.

    Raises:
        HFedMoEError: it cannot be prepared, or cannot go on.
    """
    # Imported here: these bring torch and transformers, which the command line does not wait for.
    with quick_imports():
        from hfedmoe_ray.federation.rounds import run_experiment
        from hfedmoe_ray.prepare import prepare_run

    def warn(message: str) -> None:
        trackers.event("warning", {"message": message})

    def save_model(directory: Path) -> None:
        from hfedmoe_ray.export import export_run

        export_run(context.run_dir, "hf", directory)

    render("preparing", {})
    context = prepare_run(experiment, run_dir)
    return_freed_memory()  # it has held the whole model and the data
    # The files come first: others read in them what they were not told.
    asked = destinations(experiment, context.run_dir, save_model=save_model, warn=warn)
    trackers = Trackers([FileTracker(context.run_dir), *asked, *further, RenderTracker(render)])
    executor = make_executor(context)
    try:
        return run_experiment(context, executor, trackers, resume=resume, should_stop=should_stop)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise CheckpointError(
            f"{context.run_dir} cannot be written to: {error}. The last checkpoint there is complete: make room, and "
            "`hfedmoe resume`."
        ) from error
    finally:
        executor.close()


class RenderTracker:
    """Turns a tracker's calls into (name, fields) for a screen that may be in another process (see `Tracker`)."""

    def __init__(self, render: Render) -> None:
        self._render = render

    def start(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """See `Tracker.start`."""
        self._render("start", {"config": config, "facts": facts})

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """See `Tracker.event`."""
        self._render(name, fields)

    def round(self, report: RoundReport) -> None:
        """See `Tracker.round`."""
        self._render("round", report)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """See `Tracker.finish`."""
        self._render("finish", summary)
