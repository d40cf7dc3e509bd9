"""Where the seconds of a round go."""

import time
from collections import defaultdict
from collections.abc import Iterator
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
