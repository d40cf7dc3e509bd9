"""What moves on the terminal: the run, with the time it may still take, and who is done in the round that runs."""

import time
from collections import Counter, deque
from collections.abc import Sequence

from rich.text import Text

from hfedmoe_ray.tracking.formatting import duration, roughly

TIER_COLOURS = ("blue", "yellow", "green", "magenta", "cyan", "bright_red")
_CELLS = 24
_RECENT = 5
"""Rounds that the time left is judged by: the first ones may have been slower."""
_DOING = {
    "profile": "profiling",
    "keys": "agreeing",
    "shares": "agreeing",
    "train": "training",
    "upload": "uploading",
    "unmask": "unmasking",
    "evaluate": "evaluating",
}


def tier_colour(tier: str, order: Sequence[str]) -> str:
    """The terminal colour of a tier, by its place in the configuration."""
    return TIER_COLOURS[order.index(tier) % len(TIER_COLOURS)] if tier in order else "white"


class Pace:
    """How long rounds take, from beginning to beginning, and what that leaves."""

    def __init__(self, rounds: int) -> None:
        self._rounds = rounds
        self._took: deque[float] = deque(maxlen=_RECENT)
        self._first: float | None = None
        self._round, self._since = -1, 0.0

    def begins(self, round: int, now: float) -> None:
        """A round begins; round 0, which trains nothing, says nothing of others."""
        if self._first is None:
            self._first = now
        elif self._round >= 1 and round == self._round + 1:
            self._took.append(now - self._since)
        self._round, self._since = round, now

    def left(self, now: float) -> float | None:
        """Seconds until the last round is done, at the recent pace; None before there is any."""
        if not self._took:
            return None
        pace = sum(self._took) / len(self._took)
        return (self._rounds - self._round) * pace + max(0.0, pace - (now - self._since))

    def line(self, now: float) -> Text:
        """The rounds done, and the time since the start and to the end."""
        done = max(0, self._round - 1)
        cells = done * _CELLS // max(1, self._rounds)
        line = Text.assemble((f"run  {done}/{self._rounds} rounds done ", "bold"))
        line.append("━" * cells, style="white").append("━" * (_CELLS - cells), style="bright_black")
        line.append(f"  {duration(now - (self._first or now))}", style="dim")
        if (left := self.left(now)) is not None:
            line.append(f", about {roughly(left)} left")
        line.no_wrap, line.overflow = True, "ellipsis"
        return line


class Progress:
    """What is known of one round while it runs."""

    def __init__(self, round: int = -1, cohort: int = 0) -> None:
        self.round = round
        self.counts: Counter[str] = Counter()
        self._cohort = cohort
        self._kind = ""
        self._running = 0
        self._done: list[tuple[str, str]] = []
        self._began = time.monotonic()

    def started(self, kind: str) -> None:
        """A task began; the first one of another kind begins another bar."""
        self._turn_to(kind)
        self._running += 1

    def finished(self, kind: str, tier: str, status: str) -> None:
        """A task ended."""
        self._turn_to(kind)
        self._running = max(0, self._running - 1)
        self._done.append((tier, status))
        if status != "ok":
            self.counts[status] += 1

    def retried(self) -> None:
        """A task's process died; the task will be started again."""
        self._running = max(0, self._running - 1)
        self.counts["retried"] += 1

    def _turn_to(self, kind: str) -> None:
        # Clients that train before they are evaluated take turns with the others, in one bar.
        kind = "evaluate" if kind == "personalise" else kind
        if kind != self._kind:
            self._kind, self._running, self._done = kind, 0, []

    def bar(self, rounds: int, order: Sequence[str]) -> Text:
        """The line: how many clients are done, each in its tier's colour, and what went wrong."""
        done = list(self._done)
        # An evaluation is cut into as many tasks as it likes, of which only those begun are known.
        total = self._cohort if self._kind in ("", "train") else 0
        total = max(total, len(done) + self._running, 1)
        line = Text.assemble((f"round {self.round}/{rounds}", "bold"), f" {_DOING.get(self._kind, 'planning')} ")
        for cell in range(_CELLS):
            index = cell * total // _CELLS
            tier, status = done[index] if index < len(done) else ("", "")
            line.append("━", style=tier_colour(tier, order) if status == "ok" else "red" if status else "bright_black")
        line.append(f" {len(done)}/{total}  ").append(duration(time.monotonic() - self._began), style="dim")
        if self._running:
            line.append(f"  {self._running} running")
        for kind, count in sorted(self.counts.copy().items()):
            line.append(f"  {count} {kind}", style="yellow" if kind == "retried" else "red")
        # Last, because a narrow terminal cuts the end.
        for tier, count in Counter(tier for tier, status in done if status == "ok").items():
            line.append(f"  {tier} {count}", style=tier_colour(tier, order))
        line.no_wrap, line.overflow = True, "ellipsis"
        return line
