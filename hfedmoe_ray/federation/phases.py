"""Where the seconds of a round go."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class Phases:
    """Adds up the seconds spent in blocks, by name: `with phase("train"): ...`."""

    def __init__(self) -> None:
        """Starts with nothing spent."""
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts the block's seconds, also if it raises."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started

    def move(self, seconds: float, *, of: str, to: str) -> None:
        """Counts some of one phase's seconds as another's."""
        self.seconds[of] -= seconds
        self.seconds[to] += seconds


class Waiting:
    """Measures how long the last clients of a round are waited for: since the first slot had nothing left to do."""

    def __init__(self, clients: Iterable[int]) -> None:
        """Takes note of who is going to be started."""
        self._queued = set(clients)
        self._working: set[int] = set()
        self._most = 0
        """At work at a time, so far: the slots there are, as far as this round uses them."""
        self._since: float | None = None

    @property
    def seconds(self) -> float:
        """Until now; 0 while there is work for every slot."""
        return 0.0 if self._since is None else time.perf_counter() - self._since

    def note(self, event: str, client: int) -> None:
        """Takes note of a task's start or end; other events tell nothing."""
        if event == "task_started":
            self._queued.discard(client)
            self._working.add(client)
            self._most = max(self._most, len(self._working))
        elif event == "task_finished":
            self._working.discard(client)
            if self._since is None and not self._queued and len(self._working) < self._most:
                self._since = time.perf_counter()
