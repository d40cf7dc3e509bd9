"""The server actor: the process that holds the global model, runs the rounds, owns the clients and keeps the record.

It lives on the driver's node, where the run directory is, and asks for no CPU: it works while clients wait and waits
while they work. (So it can live on a head node that offers none.) The driver only watches: it asks for news, which
the server answers from another thread as soon as there are any.
"""

import os
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from hfedmoe_ray import errors
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import HFedMoEError
from hfedmoe_ray.runtime import timeouts
from hfedmoe_ray.runtime.federate import federate
from hfedmoe_ray.runtime.metrics import RayMetrics
from hfedmoe_ray.runtime.pool import RayExecutor
from hfedmoe_ray.runtime.scaling import plan_when_there, release

FORWARDED = ("HFEDMOE_", "WANDB_", "MLFLOW_", "HF_", "TRANSFORMERS_")
"""Environment variables of the driver that hold for the server too: its cache, and its accounts."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: its summary, or the error as plain text, which any process can read."""

    summary: Mapping[str, Any] | None = None
    error: str = ""
    """Name of the error's class."""
    message: str = ""
    trace: str = ""

    @staticmethod
    def of(error: BaseException) -> "Outcome":
        """The outcome of a run that raised."""
        trace = "".join(traceback.format_exception(error))
        return Outcome(error=type(error).__name__, message=str(error), trace=trace)

    def result(self) -> dict[str, Any]:
        """The summary.

        Raises:
            HFedMoEError: of the class that the server raised, with its message.
            RuntimeError: the server raised something that is no user's fault, with its traceback.
        """
        if self.summary is not None:
            return dict(self.summary)
        kind = getattr(errors, self.error, None)
        if isinstance(kind, type) and issubclass(kind, HFedMoEError):
            raise kind(self.message)
        raise RuntimeError(f"the server failed with {self.error}: {self.message}\n{self.trace}")


class News:
    """What has happened, in order, for one reader in another process who may ask before there is anything."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._items: list[tuple[str, Any]] = []
        self._dropped = 0
        self._closed = False

    def add(self, name: str, fields: Any) -> None:
        """Adds one piece of news."""
        with self._changed:
            self._items.append((name, fields))
            self._changed.notify_all()

    def close(self) -> None:
        """There will be no more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def after(self, cursor: int, patience: float) -> tuple[list[tuple[str, Any]], bool]:
        """News from number `cursor` on, waiting up to `patience` seconds for any; and whether these are the last.

        The reader has everything before `cursor`; that is forgotten.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or cursor < self._dropped + len(self._items), patience)
            del self._items[: cursor - self._dropped]
            self._dropped = cursor
            return list(self._items), self._closed


class ServerActor:
    """One run. `run` occupies one thread, the driver's questions are answered in others."""

    def __init__(self, experiment: Experiment, run_dir: Path, resume: bool, environment: Mapping[str, str]) -> None:
        """Takes note of the run; `run` starts it."""
        os.environ.update(environment)
        self._experiment = experiment
        self._run_dir = run_dir
        self._resume = resume
        self._news = News()
        self._stop = threading.Event()

    def run(self) -> Outcome:
        """Runs the experiment to its end, whatever that is."""
        try:
            # Refused here if the clients do not fit, before minutes of preparation.
            plan_when_there(self._experiment, self._news.add)
            summary = federate(
                self._experiment,
                self._run_dir,
                resume=self._resume,
                make_executor=RayExecutor,
                render=self._news.add,
                should_stop=self._stop.is_set,
                further=[RayMetrics(self._experiment.name)],
            )
        except Exception as error:
            return Outcome.of(error)
        else:
            return Outcome(summary=summary)
        finally:
            if self._experiment.runtime.scale_up_s:
                release()  # nobody has where there was no executor yet to close
            self._news.close()

    @ray.method(concurrency_group="driver")
    def progress(self, cursor: int) -> tuple[list[tuple[str, Any]], bool]:
        """See `News.after`."""
        return self._news.after(cursor, timeouts.LONG_POLL)

    @ray.method(concurrency_group="driver")
    def stop(self) -> None:
        """Asks for an end after the round that is running."""
        self._stop.set()


RemoteServer: Any = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0, concurrency_groups={"driver": 2})(
    ServerActor
)


def forwarded_environment() -> dict[str, str]:
    """The driver's variables that hold for the server too."""
    return {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
