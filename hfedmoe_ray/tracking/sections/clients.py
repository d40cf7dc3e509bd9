"""The clients one by one: what became of their results, how well the model serves each, and a row for each."""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hfedmoe_ray.records import ClientRecord
from hfedmoe_ray.tracking import charts, maps
from hfedmoe_ray.tracking.fairness import fairness
from hfedmoe_ray.tracking.formatting import MISSING, percent, plural, short, size
from hfedmoe_ray.tracking.markup import figure, folded, section, table
from hfedmoe_ray.tracking.record import ClientFacts, RunRecord
from hfedmoe_ray.tracking.sections.budgets import ALONE
from hfedmoe_ray.tracking.sections.pieces import STATUSES, accuracies, group, tier_key, told, training
from hfedmoe_ray.tracking.thinning import span_name, spans, thinned
from hfedmoe_ray.tracking.tiers import by_tier

_MOST_CLIENTS, _MOST_OPEN = 200, 30
"""Rows of the table, and those up to which it is not folded."""
_MOST_TROUBLED, _MOST_SPANS, _MOST_DOTS = 24, 40, 500
"""What is drawn at most."""
_LETTERS = {"late": "L", "failed": "F", "memory": "M", "rejected": "R", "dropped": "D"}


def clients(run: RunRecord) -> str:
    """How the clients fared."""
    results: dict[int, list[ClientRecord]] = {}
    for result in training(run):
        results.setdefault(result.client, []).append(result)
    asked = [client for client in run.clients if client.client in results]
    shown = run.clients if len(run.clients) <= _MOST_CLIENTS else tuple((asked or run.clients)[:_MOST_CLIENTS])
    intro = fairness(run.summary).strip()
    note = "Budget, held and trained are experts; all but the budget are means over the client's rounds."
    if len(shown) < len(run.clients):
        note += (
            f" Of {plural(len(run.clients), 'client')}, {len(results)} were asked; the first {len(shown)} of "
            f"{'them' if results else 'all'} are listed, and events.jsonl has what each did."
        )
    pictures = _outcomes(run) + _served(run)
    listed = _table(run, shown, results)
    return section(
        "Clients",
        intro,
        f'<div class="pair">{pictures}</div>' if pictures else "",
        _troubled(run, results),
        folded(f"All {len(shown)} rows" if len(shown) == len(run.clients) else f"{len(shown)} clients", listed)
        if len(shown) > _MOST_OPEN
        else listed,
        f'<p class="note">{escape(note)}</p>',
    )


def _outcomes(run: RunRecord) -> str:
    """How the results of each tier ended."""
    found: dict[str, Counter[str]] = {}
    for result in training(run) or run.results:
        found.setdefault(result.tier, Counter())[result.status] += 1
    rows = [(tier, group(run, tier), found[tier]) for tier in dict.fromkeys([*run.tiers, *found]) if tier in found]
    if not rows:
        return ""
    members = Counter(client.tier for client in run.clients)

    def write(index: int) -> str:
        tier, _, counts = rows[index]
        lost = {status: counts[status] for status in STATUSES[1:]}
        words = f"{plural(members[tier], 'client')}, {counts['ok']} of {plural(sum(counts.values()), 'result')} used"
        # Many kinds do not fit; the bar tells them, and the table of tiers.
        return f"{words}: {told(lost)}" if 0 < sum(map(bool, lost.values())) <= 1 else words

    image = charts.shares(rows, label="Results of each tier by how they ended", kinds=STATUSES, write=write)
    seen = [status for status in STATUSES if any(counts[status] for _, _, counts in rows)]
    return figure("Results by tier", _status_legend(seen) + image)


def _status_legend(statuses: Sequence[str]) -> str:
    entries = (
        f'<span class="key"><i class="mark-{status}">{_LETTERS.get(status, "")}</i>{status}</span>'
        for status in statuses
    )
    return f'<p class="legend lettered">{"".join(entries)}</p>'


def _served(run: RunRecord) -> str:
    """Accuracy of every client on its own data, against how many it has."""
    own = accuracies(run)
    facts = {client.client: client for client in run.clients}
    known = thinned([client for client in sorted(own) if client in facts and facts[client].samples], _MOST_DOTS)
    if len(known) < 2:
        return ""
    image = charts.scatter(
        [
            (float(facts[c].samples), own[c], group(run, facts[c].tier), f"client {c} ({facts[c].tier or 'no tier'})")
            for c in known
        ],
        label="Accuracy of every client on its own test data, against its training examples",
        over="training examples",
        write=lambda share: f"{100 * share:.3g} %",
    )
    legend = charts.legend(run.tiers)
    return figure("Accuracy on their own test data", legend + image)


def _troubled(run: RunRecord, results: Mapping[int, Sequence[ClientRecord]]) -> str:
    """The clients of which most results were lost, round by round; nothing where none were."""
    lost = {client: sum(one.status != "ok" for one in several) for client, several in results.items()}
    worst = sorted((client for client in lost if lost[client]), key=lambda client: (-lost[client], client))
    if not worst:
        return ""
    shown = sorted(worst[:_MOST_TROUBLED])
    numbers = sorted({result.round for several in results.values() for result in several})
    columns = [[numbers[index] for index in span] for span in spans(len(numbers), _MOST_SPANS)]
    names = [span_name(column) for column in columns]
    facts = {client.client: client for client in run.clients}

    def ended(client: int, column: Sequence[int]) -> Counter[str]:
        return Counter(result.status for result in results[client] if result.round in column)

    counts = {client: [ended(client, column) for column in columns] for client in shown}

    def tier(client: int) -> str:
        return facts[client].tier if client in facts else ""

    image = maps.marks(
        [(f"client {c}", group(run, tier(c)), [_worst(by_kind) for by_kind in counts[c]]) for c in shown],
        label="How the results of the clients with lost results ended, by round",
        columns=names,
        letters=_LETTERS,
        describe=lambda row, column: (
            f"client {shown[row]} ({tier(shown[row])}), {charts.rounds_named(names[column]).removeprefix('mean of ')}: "
            f"{told(counts[shown[row]][column])}"
        ),
        corner="round",
    )
    caption = "Clients with lost results" if len(shown) == len(worst) else f"The {len(shown)} clients that lost most"
    note = "A row a client, a column a round" if len(columns) == len(numbers) else "A row a client, columns are rounds"
    return figure(caption, image, note=f"{note}; an empty cell: not asked. {len(worst)} of {len(results)} lost any.")


def _worst(statuses: Counter[str]) -> str:
    """The commonest way in which results were lost; else "ok", or nothing."""
    lost = [status for status in STATUSES[1:] if statuses[status]]
    return max(lost, key=lambda status: statuses[status]) if lost else "ok" if statuses else ""


def _table(run: RunRecord, shown: Sequence[ClientFacts], results: Mapping[int, Sequence[ClientRecord]]) -> str:
    """A row per client."""
    own, personalised = accuracies(run), accuracies(run, "personalised")
    cells = []
    for client in shown:
        known = results.get(client.client, [])
        row = next(iter(by_tier(known).values()), None)
        cells.append(
            [
                str(client.client),
                tier_key(run, client.tier),
                escape(_resources(client.resources)),
                str(client.samples or max((result.samples for result in known), default=0) or MISSING),
                _residents(client),
                f"{short(row.resident)}" if row else MISSING,
                f"{short(row.trained)}" if row else MISSING,
                size(row.bytes_up) if row else MISSING,
                f"{row.seconds:.1f} s" if row else MISSING,
                percent(own.get(client.client)),
                *([percent(personalised.get(client.client))] if personalised else []),
                told(row.statuses) if row else "never asked",
            ]
        )
    headings = ["*Client", "Tier", "Resources", "*Examples", "*Budget", "*Held", "*Trained", "*Sent", "*Time"]
    headings += ["*Own accuracy", *ALONE[: bool(personalised)], "Results"]
    return table(headings, cells)


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
