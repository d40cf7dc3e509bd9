"""Which experts were trained, when, and how evenly the work is spread over them."""

import math
from collections.abc import Sequence

from hfedmoe_ray.records import RoundReport
from hfedmoe_ray.tracking import charts, maps
from hfedmoe_ray.tracking.charts import Series
from hfedmoe_ray.tracking.formatting import plural
from hfedmoe_ray.tracking.markup import figure, section
from hfedmoe_ray.tracking.record import RunRecord
from hfedmoe_ray.tracking.sections.pieces import trains
from hfedmoe_ray.tracking.thinning import span_name, spans, thinned
from hfedmoe_ray.tracking.tiers import mean

_MOST_LAYERS, _MOST_CELLS = 12, 20_000
"""Layers drawn over rounds, and cells of all these drawings together."""

Grid = Sequence[Sequence[float]]
"""A value per expert, [L][E]."""


def selection(run: RunRecord) -> str:
    """How many clients trained each expert: over all rounds, and round by round."""
    trained = [report for report in run.rounds if trains(report)]
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
        figures += _over_rounds(trained)
    return section("Which experts were trained", intro, figures)


def selection_map(counts: Sequence[Sequence[int]], peak: int, when: str) -> str:
    """How many clients trained each expert, [L][E], coloured from 0 to `peak`, as SVG."""
    return maps.heat_map(
        counts,
        label=f"Clients that trained each expert, {when}",
        rows=[f"layer {layer}" for layer in range(len(counts))],
        columns="expert",
        peak=peak,
        describe=lambda layer, expert: f"layer {layer}, expert {expert}: {counts[layer][expert]}",
        write=lambda count: f"{count:.0f}",
    )


def _over_rounds(trained: Sequence[RoundReport]) -> str:
    """A drawing per layer: its experts against the rounds."""
    layers = _drawn_layers(trained[0].selected)
    experts = sum(len(trained[0].selected[layer]) for layer in layers)
    columns = spans(len(trained), max(6, min(60, _MOST_CELLS // experts)))
    names = [span_name([trained[index].round for index in span]) for span in columns]
    values = {
        layer: [
            [mean([trained[index].selected[layer][expert] for index in span]) for span in columns]
            for expert in range(len(trained[0].selected[layer]))
        ]
        for layer in layers
    }
    peak = max(value for rows in values.values() for row in rows for value in row)

    def describe(layer: int, expert: int) -> str:
        by_round = [report.selected[layer][expert] for report in trained]
        busiest = max(range(len(by_round)), key=lambda index: by_round[index])
        told = f"layer {layer}, expert {expert}: trained {sum(by_round)} times"
        if sum(by_round):
            told += f", in {plural(sum(map(bool, by_round)), 'round')}; most in round {trained[busiest].round} "
            told += f"({plural(by_round[busiest], 'client')})"
        return told

    drawings = "".join(
        maps.history(
            values[layer],
            label=f"Clients that trained each expert of layer {layer}, by round",
            name=f"layer {layer}",
            columns=names,
            peak=peak,
            describe=lambda expert, layer=layer: describe(layer, expert),  # type: ignore[misc]
        )
        for layer in layers
    )
    note = "Experts downwards, rounds to the right"
    note += f", each column the mean of {len(columns[0])} of them" if len(columns) < len(trained) else ""
    note += f"; {len(layers)} of {len(trained[0].selected)} layers" if len(layers) < len(trained[0].selected) else ""
    key = charts.scale("nobody" if peak < 1 else "1", plural(round(peak), "client") if peak >= 1 else f"{peak:.2f}")
    return figure("Round by round", f'{key}<div class="layers">{drawings}</div>', note=f"{note}.")


def balance(run: RunRecord) -> str:
    """How evenly the router and the training load the experts, over rounds and in the last one."""
    profiled = [report for report in run.rounds if any(map(any, report.usage))]
    trained = [report for report in run.rounds if trains(report)]
    figures = _sharing(profiled, trained) + _divergence(run.rounds)
    content = [f'<div class="pair">{figures}</div>'] if figures else []
    if profiled:
        content.append(_router_usage(profiled[0], profiled[-1]))
    return section("Load balance", "", *content) if content else ""


def _sharing(profiled: Sequence[RoundReport], trained: Sequence[RoundReport]) -> str:
    """Over how many experts the load is spread, by round."""
    curves = [
        Series(name=name, points=points)
        for name, points in (
            ("tokens, by gate value", [(float(report.round), _effective(report.usage)) for report in profiled]),
            ("clients, by what they train", [(float(report.round), _effective(report.selected)) for report in trained]),
        )
        if len(points) > 1
    ]
    if not curves:
        return ""
    image = charts.line_chart(
        curves, label="Effective number of experts by round", write=lambda number: f"{number:.3g}"
    )
    note = (
        "As many experts of a layer as would share it evenly: the exponential of the entropy, mean over layers. An "
        f"even load counts {len((profiled or trained)[-1].selected[0])}."
    )
    return figure(
        "Experts that share the load", charts.legend([one.name for one in curves], lines=True) + image, note=note
    )


def _divergence(rounds: Sequence[RoundReport]) -> str:
    """How differently clients route, by round."""
    agreement = [(float(report.round), report.agreement) for report in rounds if report.agreement is not None]
    if len(agreement) < 2:
        return ""
    curve = Series(name="divergence", points=agreement)
    image = charts.line_chart(
        [curve], label="Divergence of the clients' routing by round", write=lambda nats: f"{nats:.3g}"
    )
    note = "Mean Jensen–Shannon divergence of the clients' gate values from their mean, in nats; 0 means all alike."
    return figure("How differently clients route", image, note=note)


def _router_usage(first: RoundReport, last: RoundReport) -> str:
    """Mean gate value of each expert, in the last profiled round against the first."""
    before = first.usage if last is not first else None
    layers = _drawn_layers(last.usage)
    peak = max(value for rows in filter(None, (before, last.usage)) for row in rows for value in row)
    strips = "".join(
        maps.strip(
            last.usage[layer],
            before=before[layer] if before else None,
            even=1 / len(last.usage[layer]),
            peak=peak,
            label=f"Mean gate value of the experts of layer {layer}",
            name=f"layer {layer}",
        )
        for layer in layers
    )
    note = f"Mean gate value of each expert over the clients' tokens in round {last.round}"
    note += f"; the tick is round {first.round}, " if before else "; "
    note += "the dashed line an even share."
    if len(layers) < len(last.usage):
        note += f" {len(layers)} of {len(last.usage)} layers."
    return figure("How much the router uses them", f'<div class="many">{strips}</div>', note=note)


def _effective(load: Grid) -> float:
    """Exp of the entropy of the load over a layer's experts, mean over layers; layers without load do not count."""
    found = []
    for row in load:
        total = sum(row)
        if total:
            found.append(math.exp(-sum(part / total * math.log(part / total) for part in row if part)))
    return mean(found)


def _drawn_layers(grid: Sequence[Sequence[float]]) -> list[int]:
    return thinned(range(len(grid)), _MOST_LAYERS)
