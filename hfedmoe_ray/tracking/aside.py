"""A tracker in a thread of its own, so that a slow or broken destination can neither hold up nor stop a run."""

import queue
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from hfedmoe_ray.records import RoundReport
from hfedmoe_ray.tracking.tracker import Tracker

BACKLOG = 10_000
"""Calls that may wait; a destination that is further behind is given up."""
FINISH_TIMEOUT_S = 60.0
"""How long the end of a run may wait for what is not written yet."""
_CREDENTIALS = re.compile(r"(?<=://)[^/\s]*@")
"""Name and password in an address: what a destination says of its failure may quote it, and is written and shown."""


class Aside:
    """Passes a tracker's calls on, in order; after its first failure it is left alone, and that is told once."""

    def __init__(self, tracker: Tracker, name: str, *, warn: Callable[[str], None]) -> None:
        """Args: the destination, its name, and who is told, from the caller's thread, that it has failed."""
        self._tracker = tracker
        self._name = name
        self._warn = warn
        self._calls: queue.Queue[Callable[[], None] | None] = queue.Queue(BACKLOG)
        self._problem = ""
        self._told = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)

    def start(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """See `Tracker.start`."""
        self._thread.start()
        self._pass_on(lambda: self._tracker.start(config, facts))

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """See `Tracker.event`."""
        self._pass_on(lambda: self._tracker.event(name, fields))

    def round(self, report: RoundReport) -> None:
        """See `Tracker.round`."""
        self._pass_on(lambda: self._tracker.round(report))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """See `Tracker.finish`; waits a while for what is not written yet."""
        until = time.monotonic() + FINISH_TIMEOUT_S
        self._pass_on(lambda: self._tracker.finish(summary))
        self._pass_on(None)
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive() and not self._problem:
            self._problem = f"it was not done {FINISH_TIMEOUT_S:.0f} s after the end of the run"
        self._tell()

    def _pass_on(self, call: Callable[[], None] | None) -> None:
        self._tell()
        if self._problem:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._problem = f"it is {BACKLOG} calls behind"
            self._tell()

    def _tell(self) -> None:
        if self._problem and not self._told:
            self._told = True
            self._warn(
                f"{self._name} could not be written ({self._problem}); the run goes on without it, and metrics.jsonl "
                "has everything"
            )

    def _work(self) -> None:
        """Makes the calls. Any exception is caught: what a destination raises nobody can name in advance."""
        while (call := self._calls.get()) is not None and not self._problem:
            try:
                call()
            except Exception as error:
                told = _CREDENTIALS.sub("***@", " ".join(str(error).split()))
                self._problem = f"{type(error).__name__}: {told}"[:300]
