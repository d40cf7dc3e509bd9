"""Who has which data: the label distributions of the clients."""

import math
from collections.abc import Mapping, Sequence
from statistics import median

from hfedmoe_ray.tracking import charts, maps
from hfedmoe_ray.tracking.formatting import percent, plural
from hfedmoe_ray.tracking.markup import figure, section
from hfedmoe_ray.tracking.record import RunRecord
from hfedmoe_ray.tracking.sections.pieces import group
from hfedmoe_ray.tracking.thinning import thinned
from hfedmoe_ray.tracking.tiers import mean

_MOST_CLIENTS, _MOST_CELLS, _MOST_CLASSES, _MOST_DOTS = 100, 3000, 60, 500
"""What is drawn at most: more could not be told apart."""
_LONGEST = 26
"""Letters of a class's name."""


def partition(run: RunRecord) -> str:
    """Clients against classes, and how much each has of how many."""
    if not run.partition:
        return ""
    title = "Who has which data"
    if not any(map(any, run.partition)):
        return section(title, "Each client reads its own data where they are: the server does not know their labels.")
    tiers = {client.client: client.tier for client in run.clients}
    bubbles, told = _bubbles(run, tiers)
    mixed = _mixture(run, tiers)
    narrow = len(run.partition) <= 14
    content = f'<div class="pair">{bubbles}{mixed}</div>' if narrow else bubbles + f'<div class="pair">{mixed}</div>'
    return section(title, told + _in_words(run.partition), charts.legend(run.tiers) + content)


def _bubbles(run: RunRecord, tiers: Mapping[int, str]) -> tuple[str, str]:
    """The picture, and what it shows."""
    sums = [sum(column) for column in zip(*run.partition, strict=True)]
    names = run.labels or [str(number) for number in range(len(sums))]
    frequent = sorted(sorted(range(len(sums)), key=lambda label: -sums[label])[:_MOST_CLASSES])
    shown = thinned(range(len(run.partition)), min(_MOST_CLIENTS, _MOST_CELLS // len(frequent)))

    def describe(row: int, column: int) -> str:
        client, label = shown[column], frequent[row]
        return f"client {client} ({tiers.get(client, 'no tier')}), {names[label]}: {run.partition[client][label]}"

    image = maps.bubbles(
        [[run.partition[client][label] for client in shown] for label in frequent],
        label="Training examples of every client by class",
        rows=[_clipped(names[label]) for label in frequent],
        columns=[str(client) for client in shown],
        groups=[group(run, tiers.get(client, "")) for client in shown],
        describe=describe,
        corner="client",
    )
    how = (run.config.get("data") or {}).get("partition") or {}
    kind = {"dirichlet": f"Dirichlet {how.get('alpha')}"}.get(how.get("how", ""), how.get("how", ""))
    told = f"Training examples by class and client ({kind}); the area of a circle is their number."
    if len(run.partition) > len(shown):
        told += f" {len(shown)} of {len(run.partition)} clients, evenly spaced, are drawn."
    if len(sums) > len(frequent):
        told += f" Of {len(sums)} classes the {len(frequent)} most frequent are."
    return figure("Examples by class", image), told


def _mixture(run: RunRecord, tiers: Mapping[int, str]) -> str:
    """Each client's examples against the classes they are spread over."""
    clients = thinned([client for client, counts in enumerate(run.partition) if sum(counts)], _MOST_DOTS)
    points = [
        (float(sum(run.partition[client])), _classes(run.partition[client]), group(run, tiers.get(client, "")), client)
        for client in clients
    ]
    image = charts.scatter(
        [(x, y, colour, f"client {client} ({tiers.get(client, 'no tier')})") for x, y, colour, client in points],
        label="Examples of every client, and over how many classes they are spread",
        over="examples",
        write=lambda classes: f"{classes:.3g}",
        from_zero=True,
    )
    return figure(
        "How much, and how mixed",
        image,
        note="Upwards: over how many classes a client's examples are spread, counted as if it had the same of each "
        "(the exponential of the entropy of its labels).",
    )


def _classes(counts: Sequence[int]) -> float:
    """The effective number of classes."""
    total = sum(counts)
    return math.exp(-sum(count / total * math.log(count / total) for count in counts if count))


def _in_words(partition: Sequence[Sequence[int]]) -> str:
    sizes = [sum(counts) for counts in partition]
    largest = [max(counts) / sum(counts) for counts in partition if sum(counts)]
    return (
        f" A client has {min(sizes)} to {plural(max(sizes), 'example')}, {median(sizes):.0f} in the median; "
        f"its most frequent class is {percent(mean(largest), 0)} of them on average."
    )


def _clipped(name: str) -> str:
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
