"""The sections of a report: each a function of the run's record, empty where there is nothing to tell."""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from itertools import accumulate
from typing import Any

from hfedmoe_ray.records import ClientRecord, RoundReport
from hfedmoe_ray.tracking import charts
from hfedmoe_ray.tracking.charts import Bullet, Series
from hfedmoe_ray.tracking.fairness import fairness
from hfedmoe_ray.tracking.files import CONFIG
from hfedmoe_ray.tracking.formatting import MISSING, decimal, duration, percent, plural, short, size
from hfedmoe_ray.tracking.markup import figure, key, section, table
from hfedmoe_ray.tracking.record import ClientFacts, RunRecord
from hfedmoe_ray.tracking.tiers import TierStatistics, by_tier, mean
from hfedmoe_ray.types import ExpertKey

_MOST_CLIENTS = 200
"""Clients drawn in the partition, and rows in their table; more would not be told apart, or read."""
_ALONE = ["*After a local round"]
"""Heading of the clients' accuracy after they trained by themselves, where it was measured."""
_PHASES = ("plan", "profile", "publish", "train", "reduce", "evaluate", "checkpoint")


def trained_experts(report: RoundReport) -> list[ExpertKey]:
    """Experts that at least one client trained in a round."""
    return [
        ExpertKey(layer, expert)
        for layer, row in enumerate(report.selected)
        for expert, count in enumerate(row)
        if count
    ]


# ---------------------------------------------------------------------------------------------------- what was learnt


def learning(run: RunRecord) -> str:
    """Accuracy and loss over the rounds."""
    accuracy = _series(
        ("global model, test set", [(r.round, r.accuracy) for r in run.rounds]),
        ("clients, own test data", [(r.round, r.own_accuracy) for r in run.rounds]),
    )
    loss = _series(
        ("global model, test set", [(r.round, r.test_loss) for r in run.rounds]),
        ("clients, training data", [(r.round, r.loss) for r in run.rounds]),
    )
    figures = []
    if accuracy:
        image = charts.line_chart(accuracy, label="Accuracy by round", write=lambda share: f"{100 * share:.3g} %")
        figures.append(figure("Accuracy", charts.legend([s.name for s in accuracy], lines=True) + image))
    if loss:
        image = charts.line_chart(loss, label="Loss by round", write=lambda value: f"{value:.3g}")
        figures.append(figure("Loss", charts.legend([s.name for s in loss], lines=True) + image))
    if timed := _by_simulated_time(run):
        image = charts.line_chart(
            timed, label="Accuracy by simulated time", write=lambda share: f"{100 * share:.3g} %", over="simulated s"
        )
        figures.append(figure("Accuracy by simulated time", charts.legend([s.name for s in timed], lines=True) + image))
    if not figures:
        return section("Learning", "No round has been measured.")
    intro = (
        "Each client's own test data have their own mix of classes; it is tested on them with its resident experts."
        if any(report.own_accuracy is not None for report in run.rounds)
        else ""
    )
    if timed:
        waits = "waits for nobody" if run.config.get("asynchronous") else "waits for its slowest client"
        intro += (
            " Simulated time is arithmetic, not measured: what each round's work would take on the devices that the "
            f"tiers stand for, where a round {waits} and evaluation takes no time."
        )
    return section("Learning", intro, f'<div class="pair">{"".join(figures)}</div>')


def _by_simulated_time(run: RunRecord) -> list[Series]:
    """The global model's accuracy over the simulated clock; nothing where the run has none."""
    if any(report.simulated_seconds is None for report in run.rounds):
        return []
    clock = accumulate(report.simulated_seconds or 0.0 for report in run.rounds)
    points = [(time, r.accuracy) for time, r in zip(clock, run.rounds, strict=True) if r.accuracy is not None]
    return [Series(name="global model, test set", points=points)] if points else []


def _series(*candidates: tuple[str, Sequence[tuple[int, float | None]]]) -> list[Series]:
    measured = ((name, [(float(x), y) for x, y in points if y is not None]) for name, points in candidates)
    return [Series(name=name, points=points) for name, points in measured if points]


# ----------------------------------------------------------------------------------------------------- who has what


def partition(run: RunRecord) -> str:
    """Clients against classes."""
    if not run.partition:
        return ""
    title = "Who has which data"
    if not any(map(any, run.partition)):
        return section(title, "Each client reads its own data where they are: the server does not know their labels.")
    shown = run.partition[:_MOST_CLIENTS]
    labels = run.labels or [str(number) for number in range(len(shown[0]))]
    tiers = {client.client: client.tier for client in run.clients}

    def describe(label: int, client: int) -> str:
        return f"client {client} ({tiers.get(client, 'no tier')}), {labels[label]}: {shown[client][label]}"

    image = charts.bubbles(
        [[row[label] for row in shown] for label in range(len(labels))],
        label="Training examples of every client by class",
        rows=labels,
        columns=[str(client) for client in range(len(shown))],
        groups=[_group(run, tiers.get(client, "")) for client in range(len(shown))],
        describe=describe,
        corner="client",
    )
    how = (run.config.get("data") or {}).get("partition") or {}
    kind = {"dirichlet": f"Dirichlet {how.get('alpha')}"}.get(how.get("how", ""), how.get("how", ""))
    intro = f"Training examples by class and client ({kind}); the area of a circle is their number."
    if len(run.partition) > len(shown):
        intro += f" The first {len(shown)} of {len(run.partition)} clients are drawn."
    return section(title, intro, figure("", charts.legend(run.tiers) + image))


# ---------------------------------------------------------------------------------------------------------- experts


def selection(run: RunRecord) -> str:
    """How many clients trained each expert: over all rounds, in the first, in the last."""
    trained = [report for report in run.rounds if trained_experts(report)]
    if not trained:
        return ""
    total = [
        [sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*(r.selected for r in trained), strict=True)
    ]
    counts = [count for row in total for count in row]
    spread = (mean([(count - mean(counts)) ** 2 for count in counts])) ** 0.5 / mean(counts)
    intro = (
        f"How many times clients trained each expert, over {plural(len(trained), 'round')}. "
        f"{sum(count > 0 for count in counts)} of {len(counts)} experts were trained; the most popular {max(counts)} "
        f"times, the least {min(counts)}. The load's coefficient of variation is {spread:.2f} (0 would be even)."
    )
    figures = figure(
        "All rounds", charts.scale("1", f"{max(counts)} times") + selection_map(total, max(counts), "all rounds")
    )
    if len(trained) > 1:
        first, last = trained[0], trained[-1]
        peak = max(count for report in (first, last) for row in report.selected for count in row)
        pair = "".join(
            figure(
                f"Round {report.round}",
                charts.scale("1", plural(peak, "client"))
                + selection_map(report.selected, peak, f"round {report.round}"),
            )
            for report in (first, last)
        )
        figures += f'<div class="pair">{pair}</div>'
    return section("Which experts were trained", intro, figures)


def selection_map(counts: Sequence[Sequence[int]], peak: int, when: str) -> str:
    """How many clients trained each expert, [L][E], coloured from 0 to `peak`, as SVG."""
    return charts.heat_map(
        counts,
        label=f"Clients that trained each expert, {when}",
        rows=[f"layer {layer}" for layer in range(len(counts))],
        columns="expert",
        peak=peak,
        describe=lambda layer, expert: f"layer {layer}, expert {expert}: {counts[layer][expert]}",
        write=lambda count: f"{count:.0f}",
    )


def usage(run: RunRecord) -> str:
    """Mean gate value of each expert, in the last profiled round against the first."""
    profiled = [report for report in run.rounds if any(map(any, report.usage))]
    if not profiled:
        return ""
    first, last = profiled[0], profiled[-1]
    before = first.usage if last is not first else None
    peak = max(value for rows in filter(None, (before, last.usage)) for row in rows for value in row)
    strips = "".join(
        charts.strip(
            row,
            before=before[layer] if before else None,
            even=1 / len(row),
            peak=peak,
            label=f"Mean gate value of the experts of layer {layer}",
            name=f"layer {layer}",
        )
        for layer, row in enumerate(last.usage)
    )
    intro = f"Mean gate value of each expert over the clients' tokens in round {last.round}"
    intro += f"; the tick is round {first.round}, " if before else "; "
    intro += "the dashed line an even share."
    return section("How much the router uses them", intro, f'<div class="many">{strips}</div>')


def budgets(run: RunRecord) -> str:
    """What each tier was allowed, held, trained and sent."""
    rows = by_tier(_training(run), run.tiers)
    if not rows:
        return ""
    allowed = {
        tier: [c.resident_experts for c in run.clients if c.tier == tier and c.resident_experts is not None]
        for tier in rows
    }
    total = sum(map(len, run.rounds[-1].selected)) if run.rounds else 0
    drawn = [
        Bullet(
            name=tier,
            group=_group(run, tier),
            allowed=mean([float(count) for count in allowed[tier]]) if allowed[tier] else None,
            held=row.resident,
            used=row.trained,
        )
        for tier, row in rows.items()
    ]
    bullets = charts.bullets(
        drawn,
        label="Experts held and trained by tier, against the budget",
        total=max(total, *(bullet.held for bullet in drawn)) or 1,
        write=lambda bullet: f"{short(bullet.held)} held, {short(bullet.used)} trained",
    )
    keys = (
        '<p class="legend"><span class="key mark"><i></i>budget</span><span class="key pale c0"><i></i>held</span>'
        '<span class="key c0"><i></i>trained</span></p>'
    )
    traffic = charts.bars(
        [(tier, _group(run, tier), (row.bytes_up, row.bytes_down)) for tier, row in rows.items()],
        label="Bytes sent and received by a client in a round, by tier",
        write=size,
    )
    traffic_keys = (
        '<p class="legend"><span class="key c0"><i></i>sent to the server</span>'
        '<span class="key pale c0"><i></i>received</span></p>'
    )
    pair = figure(f"Experts, of {total}", keys + bullets) + figure("Traffic", traffic_keys + traffic)
    intro = "Means per client and round, over the results that were used."
    return section("Budgets and what became of them", intro, f'<div class="pair">{pair}</div>{_tier_table(run, rows)}')


def _tier_table(run: RunRecord, rows: Mapping[str, TierStatistics]) -> str:
    own, personalised = _own_accuracy(run), _own_accuracy(run, "personalised")
    cells = []
    for tier, row in rows.items():
        members = [client for client in run.clients if client.tier == tier]
        values, after = ([by[one.client] for one in members if one.client in by] for by in (own, personalised))
        cells.append(
            [
                _tier(run, tier),
                str(len(members)),
                f"{mean([client.samples for client in members]):.0f}",
                decimal(row.loss),
                f"{row.seconds:.1f} s",
                size(row.peak_mib * 2**20) if row.peak_mib else MISSING,
                percent(mean(values) if values else None),
                *([percent(mean(after) if after else None)] if personalised else []),
                _statuses(row.statuses),
            ]
        )
    headings = ["Tier", "*Clients", "*Examples each", "*Training loss", "*Time", "*Peak memory", "*Own accuracy"]
    return table([*headings, *_ALONE[: bool(personalised)], "Results"], cells)


# ---------------------------------------------------------------------------------------------------------- clients


def clients(run: RunRecord) -> str:
    """A row per client."""
    results: dict[int, list[ClientRecord]] = {}
    for result in _training(run):
        results.setdefault(result.client, []).append(result)
    own, personalised = _own_accuracy(run), _own_accuracy(run, "personalised")
    shown = run.clients
    if len(shown) > _MOST_CLIENTS:
        asked = [client for client in run.clients if client.client in results]
        shown = tuple((asked or run.clients)[:_MOST_CLIENTS])
    cells = []
    for client in shown:
        known = results.get(client.client, [])
        row = next(iter(by_tier(known).values()), None)
        cells.append(
            [
                str(client.client),
                _tier(run, client.tier),
                escape(_resources(client.resources)),
                str(client.samples or max((result.samples for result in known), default=0) or MISSING),
                _residents(client),
                f"{short(row.resident)}" if row else MISSING,
                f"{short(row.trained)}" if row else MISSING,
                size(row.bytes_up) if row else MISSING,
                f"{row.seconds:.1f} s" if row else MISSING,
                percent(own.get(client.client)),
                *([percent(personalised.get(client.client))] if personalised else []),
                _statuses(row.statuses) if row else "never asked",
            ]
        )
    headings = ["*Client", "Tier", "Resources", "*Examples", "*Budget", "*Held", "*Trained", "*Sent", "*Time"]
    intro = "Budget, held and trained are experts; all but the budget are means over the client's rounds."
    if len(shown) < len(run.clients):
        intro += (
            f" Of {plural(len(run.clients), 'client')}, {len(results)} were asked; the first {len(shown)} of "
            f"{'them' if results else 'all'} are listed, and events.jsonl has what each did."
        )
    intro += fairness(run.summary)
    headings += ["*Own accuracy", *_ALONE[: bool(personalised)], "Results"]
    return section("Clients", intro, table(headings, cells))


def _residents(client: ClientFacts) -> str:
    if client.resident_experts is None:
        return MISSING
    if client.batch_experts in (None, client.resident_experts):
        return str(client.resident_experts)
    return f"{client.resident_experts} ({client.batch_experts} a batch)"


def _resources(resources: Mapping[str, Any]) -> str:
    """What Ray is asked for: {"num_cpus": 0.1, "num_gpus": 0, "memory_gib": 1} -> "0.1 CPU, 1 GiB"."""
    units = {"num_cpus": "{:g} CPU", "num_gpus": "{:g} GPU", "memory_gib": "{:g} GiB"}
    told = []
    for name, amount in resources.items():
        if isinstance(amount, bool) or not isinstance(amount, int | float):
            told.append(f"{name} {amount}")
        elif amount:
            told.append(units.get(name, f"{name} {{:g}}").format(amount))
    return ", ".join(told) or MISSING


# ------------------------------------------------------------------------------------------------- where time went


def phases(run: RunRecord) -> str:
    """Where the time of each round went."""
    totals: Counter[str] = Counter()
    for report in run.rounds:
        totals.update(report.phases)
    spent = sum(totals.values())
    if not spent:
        return ""
    names = [name for name in dict.fromkeys([*_PHASES, *totals]) if totals[name] >= 0.005 * spent]
    image = charts.stacked_columns(
        [(report.round, [report.phases.get(name, 0.0) for name in names]) for report in run.rounds],
        label="Seconds of each round by phase",
        names=names,
        write=lambda seconds: f"{seconds:.3g} s",
    )
    shares = table(
        ["Phase", "*Time", "*Share"],
        [[key(name, index), duration(totals[name]), percent(totals[name] / spent)] for index, name in enumerate(names)],
    )
    longest = max(run.rounds, key=lambda report: report.seconds)
    intro = (
        f"{duration(sum(report.seconds for report in run.rounds))} in all; the longest was round {longest.round} with "
        f"{duration(longest.seconds)}. Phases below half a percent are left out."
    )
    return section("Where the time went", intro, f'<div class="pair">{figure("", image)}<div>{shares}</div></div>')


# ----------------------------------------------------------------------------------------------------- all the rest


def rounds(run: RunRecord) -> str:
    """Every round in numbers."""
    if not run.rounds:
        return ""
    cells = [
        [
            str(report.round),
            percent(report.accuracy),
            decimal(report.test_loss),
            decimal(report.loss),
            percent(report.own_accuracy),
            str(len(trained_experts(report))),
            size(report.bytes_up),
            size(report.bytes_down),
            decimal(report.agreement),
            duration(report.seconds),
            _statuses(Counter(client.status for client in report.clients)),
        ]
        for report in run.rounds
    ]
    headings = ["*Round", "*Test accuracy", "*Test loss", "*Training loss", "*Own accuracy", "*Experts", "*Up", "*Down"]
    intro = (
        "Experts: trained by at least one client. Divergence: mean Jensen–Shannon divergence of the clients' expert "
        "usage from their mean, in nats; 0 means that all route alike."
    )
    return section("All rounds", intro, table([*headings, "*Divergence", "*Time", "Results"], cells))


def configuration(run: RunRecord) -> str:
    """The configuration the run was started with, and the versions it was made with."""
    text = (run.run_dir / CONFIG).read_text(encoding="utf-8")
    return section("Configuration", "", f"<details><summary>{CONFIG}</summary><pre>{escape(text)}</pre></details>")


# ---------------------------------------------------------------------------------------------------------- pieces


def _tier(run: RunRecord, tier: str) -> str:
    return key(tier, _group(run, tier)) if tier else MISSING


def _group(run: RunRecord, tier: str) -> int:
    """The colour of a tier: its place in the configuration."""
    return run.tiers.index(tier) if tier in run.tiers else 0


def _statuses(statuses: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in statuses.items() if count) or MISSING


def _own_accuracy(run: RunRecord, name: str = "own") -> dict[int, float]:
    return {int(client): value for client, value in (run.summary.get(f"{name}_accuracy_by_client") or {}).items()}


def _training(run: RunRecord) -> list[ClientRecord]:
    """Results of rounds in which clients train: profiling passes hold every expert, and say nothing about budgets."""
    training = {report.round for report in run.rounds if trained_experts(report)}
    return [result for result in run.results if result.round in training]
