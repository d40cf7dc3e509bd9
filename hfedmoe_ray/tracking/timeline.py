"""Who was at work when: the tasks of a stretch of time, from the events of a run, and a picture of them by slot."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hfedmoe_ray.tracking.svg import LETTER, colour, image, line, rect, text, ticks

MOST_SLOTS, MOST_TASKS = 40, 800
"""What is drawn at most."""
_WIDE = 820.0
_WORK = {
    "train": "trains",
    "profile": "is profiled",
    "personalise": "trains for itself",
    "keys": "sends keys",
    "shares": "shares its secrets",
    "upload": "uploads, masked",
    "unmask": "helps to take masks off",
}


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One task in one slot; seconds count from the stretch's beginning."""

    slot: int
    client: int
    kind: str
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A round from its beginning to that of the next."""

    seconds: float
    turns: tuple[Turn, ...]

    @property
    def slots(self) -> tuple[int, ...]:
        """Those that had anything to do."""
        return tuple(sorted({turn.slot for turn in self.turns}))

    @property
    def busy(self) -> float:
        """The share of the slots' time in which they were at work."""
        return sum(turn.end - turn.start for turn in self.turns) / (self.seconds * len(self.slots))


def stretch(events: Sequence[Mapping[str, Any]], round: int) -> Stretch | None:
    """What was at work from the beginning of a round to that of the next; None where the events do not tell."""
    began = {event["round"]: event["time"] for event in events if event["event"] == "round_started"}
    if round not in began or round + 1 not in began or began[round] >= began[round + 1]:
        return None
    first, last = _seconds(began[round]), _seconds(began[round + 1])
    turns = []
    begun = defaultdict[tuple[Any, ...], list[tuple[int, str]]](list)  # slices of an evaluation may be told alike
    for event in events:
        if event["event"] not in ("task_started", "task_finished"):
            continue
        about = event["kind"], event["round"], event["client"]
        if event["event"] == "task_started":
            begun[about].append((int(event.get("slot", 0)), event["time"]))
        elif begun[about]:
            slot, started = begun[about].pop(0)
            # Times are written alike, so they compare as text: only what is drawn need be parsed.
            if started < began[round + 1] and event["time"] > began[round]:
                start, end = max(_seconds(started), first) - first, min(_seconds(event["time"]), last) - first
                turns.append(Turn(slot=slot, client=event["client"], kind=event["kind"], start=start, end=end))
    return Stretch(seconds=last - first, turns=tuple(turns)) if turns else None


def _seconds(time: str) -> float:
    return datetime.fromisoformat(time).timestamp()


def timeline(drawn: Stretch, *, label: str, groups: Mapping[int, int]) -> str:
    """A row for each slot, a bar for each task: full for training in its client's colour (`groups`), else pale."""
    slots = drawn.slots[:MOST_SLOTS]
    row = {slot: index for index, slot in enumerate(slots)}
    left, tall = 14 + LETTER * (5 + len(str(slots[-1]))), 20.0 if len(slots) <= 12 else 11.0
    marks = [mark for mark in ticks(0.0, drawn.seconds, 8) if mark <= drawn.seconds]
    bottom, scale = tall * len(slots), (_WIDE - left - 16) / drawn.seconds
    parts = [line(left + mark * scale, 0, left + mark * scale, bottom) for mark in marks]
    parts += [text(left + mark * scale, bottom + 14, f"{mark:,.6g}") for mark in marks]
    parts.append(text((left + _WIDE) / 2, bottom + 29, "seconds", "name"))
    if tall > 12:
        parts += [text(left - 7, (row[slot] + 0.5) * tall + 3.5, f"slot {slot}", anchor="end") for slot in slots]
    for turn in [turn for turn in drawn.turns if turn.slot in row][:MOST_TASKS]:
        x, y, wide = left + turn.start * scale, row[turn.slot] * tall + 1.5, (turn.end - turn.start) * scale
        evaluates = turn.kind == "evaluate"  # mostly slices of the global test data, which is no client's
        who = "evaluation" if evaluates else f"client {turn.client} {_WORK.get(turn.kind, turn.kind)}"
        group = colour(groups.get(turn.client, 0))
        kind = "evaluates" if evaluates else f"fill {group}" if turn.kind == "train" else f"pale {group}"
        tip = f"{who}: {turn.end - turn.start:.2f} s"
        parts.append(rect(x, y, max(0.8, wide - 1), tall - 3, kind=kind, tip=tip))
        if not evaluates and wide > LETTER * len(str(turn.client)) + 6 and tall > 12:
            parts.append(text(x + wide / 2, y + tall / 2 + 2.5, str(turn.client), "letter"))
    return image(_WIDE, bottom + 34, label, *parts)
