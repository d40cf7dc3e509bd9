"""What went wrong in a run, as a section of its report."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from hfedmoe_ray.tracking.formatting import MISSING
from hfedmoe_ray.tracking.markup import section, table
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
_MOST = 300
"""Rows shown; a run with more has one cause, told in the first."""
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
    intro = f"The first {_MOST} of {len(rows)}; events.jsonl has all." if len(rows) > _MOST else ""
    return section(
        title, intro, table(["*Round", "*Client", "What", "Reason"], [r for _, r in rows[:_MOST]], wrap=True)
    )


def _unused_results(run: RunRecord) -> Iterator[Row]:
    traces = {(e.get("round"), e.get("client")): str(e["traceback"]) for e in run.events if e.get("traceback")}
    for result in run.results:
        if result.status != "ok":
            trace = traces.get((result.round, result.client))
            reason = escape(result.reason or "no reason given")
            detail = f"<details><summary>Traceback</summary><pre>{escape(trace)}</pre></details>" if trace else ""
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
