"""A run as one page: `report.html`, self-contained, without a script and without a request to anywhere.

Everything is drawn from the files the run left (`record.read_run`); what a run did not record is left out or said to
be unknown. The sections are in `sections`, the drawings in `charts`, the look in `report.css`.
"""

import re
from collections.abc import Iterable
from html import escape
from importlib.resources import files
from pathlib import Path

from hfedmoe_ray.tracking.attacked import attacked
from hfedmoe_ray.tracking.formatting import MISSING, duration, percent, plural, points, size
from hfedmoe_ray.tracking.jsonl import write_atomic
from hfedmoe_ray.tracking.record import RunRecord, read_run
from hfedmoe_ray.tracking.sections.attack import attack
from hfedmoe_ray.tracking.sections.budgets import budgets
from hfedmoe_ray.tracking.sections.clients import clients
from hfedmoe_ray.tracking.sections.experts import balance, selection
from hfedmoe_ray.tracking.sections.learning import learning
from hfedmoe_ray.tracking.sections.partition import partition
from hfedmoe_ray.tracking.sections.pieces import trained_experts
from hfedmoe_ray.tracking.sections.privacy import privacy
from hfedmoe_ray.tracking.sections.robust import robust
from hfedmoe_ray.tracking.sections.rounds import configuration, rounds
from hfedmoe_ray.tracking.sections.time_spent import time_spent
from hfedmoe_ray.tracking.troubles import troubles

_STRATEGIES = {
    "hfedmoe": "HFedMoE",
    "flex_moe": "FLEX-MoE",
    "fedavg": "FedAvg",
    "fedprox": "FedProx",
    "fedmoe": "FedMoE",
    "frequency": "most frequent experts",
    "random": "random experts",
    "local": "local training",
}


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir`/report.html from the run's record and returns its path.

    Raises:
        CheckpointError: `run_dir` holds no run, or a damaged one.
    """
    path = run_dir / "report.html"
    write_atomic(path, render(read_run(run_dir)))
    return path


def render(run: RunRecord) -> str:
    """Returns the page. It is a function of the record alone: the same run gives the same page."""
    parts = (
        learning,
        attack,
        robust,
        privacy,
        partition,
        selection,
        balance,
        budgets,
        clients,
        time_spent,
        troubles,
        rounds,
        configuration,
    )
    sections = [text for part in parts if (text := part(run))]
    body = f"{_header(run)}{_contents(sections)}<main>{''.join(sections)}</main>{_footer(run)}"
    style = files("hfedmoe_ray.tracking").joinpath("report.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(run.name)} – federated run</title>\n<link rel="icon" href="data:,">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def _header(run: RunRecord) -> str:
    strategy = _STRATEGIES.get(run.strategy, run.strategy)
    eyebrow = " · ".join(filter(None, [strategy, f"seed {run.config.get('seed', MISSING)}", run.ended[:10]]))
    return (
        f'<header><p class="eyebrow">{escape(eyebrow)}</p><h1>{escape(run.name)}</h1>'
        f'<p class="lede">{_lede(run)}</p>{_alarm(run)}{_figures(run)}</header>\n'
    )


def _contents(sections: Iterable[str]) -> str:
    """Links to the sections."""
    headings = (re.search(r'<h2 id="(.+?)">(.+?)</h2>', text) for text in sections)
    links = "".join(f'<li><a href="#{found[1]}">{found[2]}</a></li>' for found in headings if found)
    return f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n'


def _lede(run: RunRecord) -> str:
    """The result in two sentences."""
    rounds = max((report.round for report in run.rounds), default=0)
    who = plural(len(run.clients), "client") + (f" of {plural(len(run.tiers), 'tier')}" if run.tiers else "")
    what = f"{who} trained for {plural(rounds, 'round')}"
    measured = [(report.round, report.accuracy) for report in run.rounds if report.accuracy is not None]
    if not measured:
        return f"{what}. The global model was not evaluated."
    (first_round, first), (_, last) = measured[0], measured[-1]
    writes = (run.config.get("model") or {}).get("task") in ("causal", "seq2seq")
    does, of = ("predicts", "the tokens of the test set's responses") if writes else ("classifies", "the test set")
    result = f"{what}. The global model now {does} <b>{percent(last)}</b> of {of} correctly"
    if len(measured) == 1:
        return f"{result}."
    before = "before training" if first_round == 0 else f"after round {first_round}"
    was = f'<span class="unbroken">{percent(first)}</span>'
    return f'{result}; {before} it was {was} (<span class="unbroken">{points(first, last)}</span>).'


def _alarm(run: RunRecord) -> str:
    """Banners where the run was attacked on purpose, or did not end well."""
    told = ""
    if options := run.config.get("attack"):
        words = escape(attacked(options, run.hostile))
        told = f'<div class="alarm"><p><b>Simulated attack:</b> {words}.</p></div>'
    return told + _ended(run)


def _ended(run: RunRecord) -> str:
    if error := run.summary.get("error"):
        return f'<div class="alarm"><p><b>The run failed.</b> {escape(str(error))}</p></div>'
    if run.summary.get("status") == "stopped":
        return '<div class="alarm"><p><b>The run was stopped</b> before its last round; it can be resumed.</p></div>'
    if not run.summary:
        return '<div class="alarm"><p><b>The run has not ended</b>, or was killed: what is recorded so far.</p></div>'
    return ""


def _figures(run: RunRecord) -> str:
    """The numbers one looks for first."""
    accuracies = [(r.accuracy, r.round) for r in run.rounds if r.accuracy is not None]
    own = [(r.own_accuracy, r.round) for r in run.rounds if r.own_accuracy is not None]
    trained = {key for r in run.rounds for key in trained_experts(r)}
    total = sum(map(len, run.rounds[-1].selected)) if run.rounds else 0
    peak = max((result.peak_mib for result in run.results), default=0.0)
    statuses = [result.status for result in run.results]
    rows: list[tuple[str, str, str]] = []
    if accuracies:
        best, best_round = max(accuracies, key=lambda item: item[0])
        rows.append(("Test accuracy", percent(accuracies[-1][0]), f"best {percent(best)} in round {best_round}"))
    if own:
        rows.append(("Own test data", percent(own[-1][0]), "mean of clients, residents only"))
    if trained or not any(r.privacy for r in run.rounds):  # where the model is private, the record does not say
        rows.append(("Experts trained", f"{len(trained)} of {total}", "at least once, by any client"))
    up, down = sum(r.bytes_up for r in run.rounds), sum(r.bytes_down for r in run.rounds)
    rows.append(("Traffic", size(up + down), f"{size(up)} to the server, {size(down)} to clients"))
    rows.append(
        ("Wall time", duration(sum(r.seconds for r in run.rounds)), f"{plural(len(run.rounds), 'round')} recorded")
    )
    if run.summary.get("simulated_seconds") is not None:
        rows.append(("Simulated time", duration(run.summary["simulated_seconds"]), "on the tiers' devices"))
    if peak:
        rows.append(("Largest client", size(peak * 2**20), "peak memory of its process"))
    if statuses:
        rows.append(("Results used", f"{statuses.count('ok')} of {len(statuses)}", _losses(statuses)))
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in rows
    )
    return f'<dl class="figures">{cells}</dl>'


def _losses(statuses: Iterable[str]) -> str:
    lost = [status for status in statuses if status != "ok"]
    return ", ".join(f"{lost.count(kind)} {kind}" for kind in dict.fromkeys(lost)) or "none lost"


def _footer(run: RunRecord) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in run.versions.items() if name != "git")
    if commit := run.versions.get("git"):
        versions += f", commit {commit[:12]}{' with changes' if commit.endswith('-dirty') else ''}"
    return f"<footer><p>Drawn from the record of this run, made with {escape(versions or MISSING)}.</p></footer>\n"
