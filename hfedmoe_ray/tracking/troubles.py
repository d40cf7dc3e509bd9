"""What went wrong in a run, as a section of its report."""

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from hfedmoe_ray.tracking.formatting import MISSING
from hfedmoe_ray.tracking.markup import folded, section, table
from hfedmoe_ray.tracking.record import RunRecord

_TROUBLES = {
    "task_retried": "tried again",
    "slot_lost": "slot lost",
    "below_quorum": "below quorum",
    "over_memory": "over its memory",
    "demoted": "out of memory, demoted",
    "bounds_relaxed": "bounds relaxed",
    "waiting": "waited",
    "warning": "warning",
}
"""Events that are told, and how they are called."""
_EVALUATIONS = ("evaluate", "personalise")
_MOST, _MOST_OPEN, _MOST_KINDS = 300, 20, 12
"""Rows shown, those up to which they are not folded, and kinds told apart then."""
_LONGEST = 6000
"""Characters of a traceback, from its end."""
_KNOWN = {"time", "event", "round", "client", "kind", "status", "traceback"}
"""Fields of an event that stand in other columns."""

Row = tuple[int, list[str]]
"""The round to sort by (-1 for none), and the cells."""


def troubles(run: RunRecord) -> str:
    """Every result that could not be used, and what else went wrong, by round."""
    title = "What went wrong"
    rows = sorted([*_unused_results(run), *_events(run)], key=lambda row: row[0])
    if not rows:
        quiet = "Nothing: no client was late, failed, rejected or dropped, and no task had to be repeated."
        return section(title, quiet)
    listed = table(["*Round", "*Client", "What", "Reason"], [cells for _, cells in rows[:_MOST]], wrap=True)
    if len(rows) <= _MOST_OPEN:
        return section(title, "", listed)
    told = f"The first {_MOST} of {len(rows)}" if len(rows) > _MOST else f"All {len(rows)}"
    intro = "The commonest first" + (f"; of {len(rows)}, events.jsonl has all." if len(rows) > _MOST else ".")
    return section(title, intro, _commonest(rows), folded(told, listed))


def _commonest(rows: Sequence[Row]) -> str:
    """Troubles of one kind and reason together; numbers in the reasons, which may differ, are the first one's."""
    alike: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        _, _, what, reason = row[1]
        alike.setdefault((what, re.sub(r"[0-9.]+", "#", reason.partition("<details>")[0])), []).append(row)
    most = sorted(alike.values(), key=len, reverse=True)[:_MOST_KINDS]
    cells = []
    for several in most:
        _, _, what, reason = several[0][1]
        clients = len({row[1][1] for row in several} - {MISSING})
        cells.append([what, str(len(several)), str(clients), f"{several[0][1][0]}–{several[-1][1][0]}", reason])
    return table(["What", "*Times", "*Clients", "*Rounds", "Reason"], cells, wrap=True)


def _unused_results(run: RunRecord) -> Iterator[Row]:
    traces = {(e.get("round"), e.get("client")): str(e["traceback"]) for e in run.events if e.get("traceback")}
    for result in run.results:
        if result.status != "ok":
            trace = traces.get((result.round, result.client))
            reason = escape(result.reason or "no reason given")
            detail = (
                f"<details><summary>Traceback</summary><pre>{escape(trace[-_LONGEST:])}</pre></details>"
                if trace
                else ""
            )
            yield result.round, [str(result.round), str(result.client), result.status, reason + detail]


def _events(run: RunRecord) -> Iterator[Row]:
    for event in run.events:
        what = _TROUBLES.get(event["event"])
        # An evaluation has no line of its own among the results: only its task tells that it failed.
        if what is None and event.get("kind") in _EVALUATIONS and event.get("status", "ok") != "ok":
            what = f"evaluation {event['status']}"
        if what is not None:
            round, client = event.get("round"), event.get("client")
            told = [str(MISSING if number is None else number) for number in (round, client)]
            yield -1 if round is None else round, [*told, what, escape(_reason(event))]


def _reason(event: Mapping[str, Any]) -> str:
    """An event's own words, else its other fields."""
    told = event.get("reason") or event.get("message")
    rest = ", ".join(f"{name} {value}" for name, value in event.items() if name not in _KNOWN)
    return str(told or rest or MISSING)
