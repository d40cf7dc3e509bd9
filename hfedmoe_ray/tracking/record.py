"""A run directory read back as typed values: what the report is drawn from."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import yaml

from hfedmoe_ray.errors import CheckpointError
from hfedmoe_ray.records import ClientRecord, NodeUsage, RoundReport
from hfedmoe_ray.tracking.files import CONFIG, EVENTS, FACTS, METRICS, SUMMARY
from hfedmoe_ray.tracking.jsonl import read_lines

Built = TypeVar("Built", "ClientFacts", ClientRecord, NodeUsage, RoundReport)


@dataclass(frozen=True, kw_only=True)
class ClientFacts:
    """Who a client is, for the whole run."""

    client: int
    tier: str = ""
    resources: Mapping[str, Any] = field(default_factory=dict)
    """What Ray was asked for."""
    samples: int = 0
    """Training examples."""
    resident_experts: int | None = None
    """Experts its memory budget holds, over all layers."""
    batch_experts: int | None = None
    """Experts its compute budget trains in one batch."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything a run left behind. What it did not tell is empty, never invented."""

    run_dir: Path
    config: Mapping[str, Any]
    clients: tuple[ClientFacts, ...]
    rounds: tuple[RoundReport, ...]
    results: tuple[ClientRecord, ...]
    """What each client did in each round, those of rounds that never completed included."""
    events: tuple[Mapping[str, Any], ...]
    """Events other than client results."""
    summary: Mapping[str, Any]
    """Empty while the run goes on, or when it was killed."""
    labels: tuple[str, ...]
    partition: tuple[tuple[int, ...], ...]
    """Training examples by [client][class]; empty when unknown."""
    hostile: tuple[int, ...]
    """Clients of a simulated attack."""
    predicted_mib: Mapping[str, float]
    """What a client of each tier was predicted to need of memory; empty where that cannot be compared."""
    shape: Mapping[str, Any]
    versions: Mapping[str, str]
    ended: str
    """When the last round was completed, ISO 8601; empty before."""

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.config.get("name") or self.run_dir.resolve().name)

    @property
    def strategy(self) -> str:
        """The strategy's configured name."""
        configured = self.config.get("strategy")
        return str(configured.get("name", "") if isinstance(configured, Mapping) else configured or "")

    @cached_property
    def tiers(self) -> tuple[str, ...]:
        """Tier names in the order of the configuration, then those only results name."""
        configured = (self.config.get("clients") or {}).get("tiers") or ()
        named = [tier["name"] for tier in configured]
        seen = [client.tier for client in self.clients] + [result.tier for result in self.results]
        return tuple(dict.fromkeys([*named, *(tier for tier in seen if tier)]))


def read_run(run_dir: Path) -> RunRecord:
    """Reads a run directory, complete, still growing, or cut off.

    Raises:
        CheckpointError: The directory does not exist, holds no run, or one of its files is damaged.
    """
    if not (run_dir / CONFIG).exists():
        raise CheckpointError(
            f"{run_dir} is not a run directory: it holds no {CONFIG}. Give the directory a run has written, such as "
            "runs/quickstart."
        )
    facts = _read_json(run_dir / FACTS)
    lines = read_lines(run_dir / METRICS)
    events = read_lines(run_dir / EVENTS)
    # A round below quorum is tried again: the last result of a client in a round is the one that counted.
    results = {
        (line["round"], line["client"]): _build(ClientRecord, line) for line in events if line["event"] == "client"
    }
    of_round: dict[int, list[ClientRecord]] = {}
    for (number, _), result in results.items():
        of_round.setdefault(number, []).append(result)
    rounds = tuple(
        _report(line, tuple(of_round.get(line["round"], ())))
        for line in sorted(lines, key=lambda line: int(line["round"]))
    )
    clients = tuple(_build(ClientFacts, client) for client in facts.get("clients") or ())
    return RunRecord(
        run_dir=run_dir,
        config=yaml.safe_load((run_dir / CONFIG).read_text(encoding="utf-8")) or {},
        clients=clients or _clients_seen(results.values()),
        rounds=rounds,
        results=tuple(results.values()),
        events=tuple(line for line in events if line["event"] != "client"),
        summary=_read_json(run_dir / SUMMARY),
        labels=tuple(map(str, facts.get("labels") or ())),
        partition=tuple(tuple(row) for row in facts.get("partition") or ()),
        hostile=tuple(facts.get("hostile") or ()),
        predicted_mib=facts.get("predicted_mib") or {},
        shape=facts.get("shape") or {},
        versions=facts.get("versions") or {},
        ended=str(lines[-1]["time"]) if lines else "",
    )


def round_report(line: Mapping[str, Any]) -> RoundReport:
    """Builds a report from its fields as JSON carries them, its clients included."""
    return _report(line, tuple(_build(ClientRecord, client) for client in line["clients"]))


def _report(line: Mapping[str, Any], clients: tuple[ClientRecord, ...]) -> RoundReport:
    nodes = tuple(_build(NodeUsage, node) for node in line.get("nodes") or ())
    return _build(RoundReport, {**line, "clients": clients, "nodes": nodes})


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}). Restore it, or delete it to go on without it.") from error


def _build(kind: type[Built], line: Mapping[str, Any]) -> Built:
    """Builds a dataclass from its line, without what other versions may have added; null means the default, if any."""
    values = {
        field.name: line[field.name]
        for field in dataclasses.fields(kind)
        if field.name in line and (line[field.name] is not None or field.default is dataclasses.MISSING)
    }
    try:
        return kind(**values)
    except TypeError as error:
        raise CheckpointError(
            f"A record cannot be read as {kind.__name__} ({error}): another version of hfedmoe wrote this run. "
            "Read it with that version (facts.json names it)."
        ) from error


def _clients_seen(results: Iterable[ClientRecord]) -> tuple[ClientFacts, ...]:
    """What results tell of their clients, where no facts do."""
    seen = {
        result.client: ClientFacts(client=result.client, tier=result.tier, samples=result.samples) for result in results
    }
    return tuple(seen[client] for client in sorted(seen))
