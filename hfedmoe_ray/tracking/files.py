"""The files of a run directory: the truth about a run, whatever becomes of every other destination.

    config.yaml     the resolved configuration, which can be run again as it is; versions in its first lines
    facts.json      who takes part and with what: clients, budgets, partition, label names, model shape, versions
    metrics.jsonl   one line a round: a `RoundReport` without its clients
    events.jsonl    one line per client result and per event, in the order they happened
    summary.json    the result, once the run has ended

An `OSError` here is not caught: a run whose record cannot be written must not go on unrecorded.
"""

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hfedmoe_ray.config.load import dump_experiment
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.records import RoundReport
from hfedmoe_ray.tracking.jsonl import append_line, dumps, plain, read_lines, write_atomic
from hfedmoe_ray.tracking.versions import software_versions

CONFIG, FACTS, METRICS, EVENTS, SUMMARY = "config.yaml", "facts.json", "metrics.jsonl", "events.jsonl", "summary.json"

Line = dict[str, Any]


class FileTracker:
    """Writes a run's record (see `Tracker`). No round and no client's result of a round ever stands there twice."""

    def __init__(self, run_dir: Path) -> None:
        self._dir = run_dir
        self._rounds: set[int] = set()
        self._clients: dict[tuple[int, int], Line] = {}

    def start(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Begins a record, or goes on with one.

        `facts["resumed_from"]`, when it is there, is the last round the resumed checkpoint holds: later rounds are
        taken back (`rewind`). Without it the directory's former record is replaced.
        """
        self._dir.mkdir(parents=True, exist_ok=True)
        versions = software_versions() | dict(facts.get("versions") or {})
        resumed_from = facts.get("resumed_from")
        (self._dir / SUMMARY).unlink(missing_ok=True)
        self._rounds.clear()
        self._clients.clear()
        if resumed_from is None:
            (self._dir / METRICS).unlink(missing_ok=True)
            (self._dir / EVENTS).unlink(missing_ok=True)
        else:
            self.rewind(resumed_from)
            self.event("resumed", {"resumed_from": resumed_from, "versions": versions})
        write_atomic(self._dir / CONFIG, _config_text(config, versions))
        write_atomic(self._dir / FACTS, _facts_text({**facts, "versions": versions}))

    def rewind(self, last: int) -> None:
        """Takes back every line about a round after `last`, and a line torn by a crash.

        The rounds are about to be computed again; events that name no round, such as a lost slot, did happen and stay.
        """

        def keep(line: Line) -> bool:
            return not isinstance(line.get("round"), int) or line["round"] <= last

        for name in (METRICS, EVENTS):
            self._rewrite(name, keep)
        self._rounds = {line["round"] for line in read_lines(self._dir / METRICS)}
        # The last round may still have to be evaluated, and is then reported (again), with its clients.
        told = [line for line in read_lines(self._dir / EVENTS) if line["event"] == "client" and line["round"] == last]
        for line in told:
            del line["time"], line["event"]
            self._clients[line["round"], line["client"]] = line

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Appends one line; a "client" event that repeats the last one of its client and round is left out."""
        line = plain(fields)
        if name == "client":
            key = (line["round"], line["client"])
            if self._clients.get(key) == line:
                return
            self._clients[key] = line
        append_line(self._dir / EVENTS, {"time": _now(), "event": name, **line})

    def round(self, report: RoundReport) -> None:
        """Appends the round, and those of its client results that no event has told yet."""
        for client in report.clients:
            self.event("client", plain(client))
        self._clients.clear()
        if report.round in self._rounds:
            self._rewrite(METRICS, lambda line: line["round"] != report.round)
        line = plain(report)
        del line["clients"]
        append_line(self._dir / METRICS, {"time": _now(), **line})
        self._rounds.add(report.round)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes the summary, as a whole or not at all."""
        write_atomic(self._dir / SUMMARY, dumps(summary, indent=1) + "\n")

    def _rewrite(self, name: str, keep: Callable[[Line], bool]) -> None:
        path = self._dir / name
        if path.exists():
            write_atomic(path, "".join(dumps(line) + "\n" for line in read_lines(path) if keep(line)))


def _facts_text(facts: Mapping[str, Any]) -> str:
    """JSON with a line for each fact: there may be very many clients."""
    return "{\n" + ",\n".join(f" {dumps(name)}: {dumps(value)}" for name, value in facts.items()) + "\n}\n"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _config_text(config: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """The configuration as YAML. Versions are comments, so that `hfedmoe run config.yaml` repeats the run."""
    made_with = "".join(f"# {name}: {number}\n" for name, number in versions.items())
    resolved = dump_experiment(Experiment.model_validate(config))
    return f"# The resolved configuration of this run, made with\n{made_with}{resolved}"
