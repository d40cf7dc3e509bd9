"""A comparison as one page: self-contained, without a script and without a request to anywhere."""

from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files

from hfedmoe_ray.comparison import charts
from hfedmoe_ray.comparison.charts import Curve, Dots
from hfedmoe_ray.comparison.design import Design, show_setting
from hfedmoe_ray.comparison.outcome import ACCURACY, GROUPS, MEASURED, METRICS, Metric, Outcome
from hfedmoe_ray.comparison.statistics import estimate
from hfedmoe_ray.comparison.tables import (
    Cell,
    Table,
    glossary,
    heading,
    reading,
    shown_metrics,
    write_cell,
    write_value,
)
from hfedmoe_ray.tracking.formatting import MISSING, plural
from hfedmoe_ray.tracking.markup import figure, key, section, table


def render(design: Design, tables: Sequence[Table], outcomes: Sequence[Outcome], failures: Sequence[str]) -> str:
    """Returns the page."""
    body = _header(design, tables, outcomes, failures)
    for one in tables:
        here = [outcome for outcome in outcomes if outcome.setting == one.setting]
        body += _setting(design, tables, one, here)
    body += _terms(design, tables) + _measured(design, outcomes)
    style = "".join(
        files(package).joinpath(name).read_text(encoding="utf-8")
        for package, name in (("hfedmoe_ray.tracking", "report.css"), ("hfedmoe_ray.comparison", "page.css"))
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(design.name)} – comparison</title>\n<link rel="icon" href="data:,">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def _header(design: Design, tables: Sequence[Table], outcomes: Sequence[Outcome], failures: Sequence[str]) -> str:
    counts = [plural(len(design.seeds), "seed")]
    counts += [plural(len(design.settings), "setting")] if len(design.settings) > 1 else []
    runs = f"{len(outcomes)} of {plural(len(design.runs), 'run')} finished"
    alarm = ""
    if failures:
        told = "\n".join(failures)
        alarm = f'<div class="alarm"><p><b>Runs are missing.</b> {escape(told)}</p></div>'
    return (
        f'<header><p class="eyebrow">{escape(" · ".join([*counts, runs]))}</p><h1>{escape(design.name)}</h1>'
        f'<p class="lede">{_lede(design, tables)}</p>{alarm}'
        f'<p class="reading">{escape(reading(design, "a box"))}</p></header>\n'
    )


def _lede(design: Design, tables: Sequence[Table]) -> str:
    """Who is ahead, in a sentence for each accuracy; no more than the first setting's where there are several."""
    count = len(design.strategies)
    compared = f"{count} strategies on equal terms." if count > 1 else "One strategy, with nothing to compare it with."
    found = []
    for metric, what in ((ACCURACY[0], "the global model"), (ACCURACY[2], "clients on their own data")):
        ahead = [name for one in tables for name, cells in one.rows.items() if cells[metric.key].best]
        if not ahead:
            continue
        best = max(dict.fromkeys(ahead), key=ahead.count)
        cell = next(one.rows[best][metric.key] for one in tables if one.rows[best][metric.key].best)
        where = "" if len(tables) == 1 else f" in {ahead.count(best)} of {len(tables)} settings"
        value = f" ({escape(write_cell(metric, cell))} %)" if len(tables) == 1 else ""
        found.append(f"for {what} <b>{escape(best)}</b> is ahead{where}{value}")
    return compared + (f" On average, {'; '.join(found)}." if found else "")


def _setting(design: Design, tables: Sequence[Table], one: Table, outcomes: Sequence[Outcome]) -> str:
    """Tables and figures of one setting."""
    content = ""
    for title, group in GROUPS:
        metrics = shown_metrics(tables, group)
        if metrics:
            content += f"<h3>{title}</h3>{_table(design, one, metrics)}"
    content += _figures(design, outcomes)
    return section(one.setting or "Results", "", content)


def _table(design: Design, one: Table, metrics: Sequence[Metric]) -> str:
    rows = [
        [
            key(strategy, design.strategies.index(strategy)),
            str(cells[metrics[0].key].runs),
            *(_marked(metric, cells[metric.key]) for metric in metrics),
        ]
        for strategy, cells in one.rows.items()
    ]
    return table(["Strategy", "*n", *(f"*{heading(metric)}" for metric in metrics)], rows)


def _marked(metric: Metric, cell: Cell) -> str:
    """A cell as HTML: the best in a box, the significantly worse with a star."""
    text = escape(write_cell(metric, cell))
    if " ± " in text:
        mean, _, rest = text.partition(" ± ")
        text = f'{mean}<span class="plus"> ± {rest}</span>'
    if cell.best:
        return f'<span class="best">{text}</span>'
    if cell.worse and cell.test is not None:
        tip = f"{cell.test.n} pairs, p = {cell.test.p_holm:.3g} after Holm"
        return f'{text}<span class="star" title="{tip}"> *</span>'
    return text


# ------------------------------------------------------------------------------------------------------- figures


def _figures(design: Design, outcomes: Sequence[Outcome]) -> str:
    """Every figure there are data for."""
    by_strategy = [
        (name, number, [one for one in outcomes if one.strategy == name])
        for number, name in enumerate(design.strategies)
    ]
    present = [row for row in by_strategy if row[2]]
    drawn = "".join([_by_round(present), _by_bytes(present), _by_client(present), _by_expert(present)])
    if not drawn:
        return ""
    if len(present) > charts.TOGETHER:  # where each has a panel of its own, with its name
        return f"<h3>Figures</h3>{drawn}"
    names = charts.legend([(name, number) for name, number, _ in present])
    return f'<h3>Figures</h3>{names}<div class="pair">{drawn}</div>'


Row = tuple[str, int, list[Outcome]]


def _curve(
    row: Row, x_of: Callable[[tuple[int, float, int]], float], average: Callable[[Sequence[float]], float]
) -> Curve | None:
    """A strategy's mean accuracy over seeds at each round that all its runs evaluated, with the seeds' range."""
    name, number, runs = row
    shared = set.intersection(*({round for round, _, _ in one.curve} for one in runs))
    points, band = [], []
    for round in sorted(shared):
        there = [next(point for point in one.curve if point[0] == round) for one in runs]
        accuracies = [accuracy for _, accuracy, _ in there]
        points.append((average([x_of(point) for point in there]), sum(accuracies) / len(accuracies)))
        band.append((min(accuracies), max(accuracies)))
    if not points:
        return None
    return Curve(name=name, number=number, points=points, band=band if len(runs) > 1 else ())


def _by_round(rows: Sequence[Row]) -> str:
    drawn = [curve for row in rows if (curve := _curve(row, lambda point: point[0], max))]
    if not drawn:
        return ""
    image = charts.curves(
        drawn,
        label="Accuracy of the global model by round and strategy",
        across_is="round",
        write_x=lambda x: f"{x:g}",
        write_y=lambda share: f"{100 * share:.3g} %",
        whole=True,
    )
    return figure("Accuracy by round: mean, and the range of the seeds", image)


def _by_bytes(rows: Sequence[Row]) -> str:
    drawn = [curve for row in rows if (curve := _curve(row, lambda point: point[2] / 2**20, lambda x: sum(x) / len(x)))]
    if not drawn:
        return ""
    image = charts.curves(
        drawn,
        label="Accuracy of the global model by bytes sent and strategy",
        across_is="MiB sent, both ways",
        write_x=lambda x: f"{x:,.6g}",
        write_y=lambda share: f"{100 * share:.3g} %",
    )
    return figure("Accuracy by traffic: mean, and the range of the seeds", image)


def _by_client(rows: Sequence[Row]) -> str:
    drawn = [
        Dots(
            name=name,
            number=number,
            before=[value for one in runs for value in one.own.values()],
            after=[value for one in runs for value in one.personalised.values()],
        )
        for name, number, runs in rows
    ]
    drawn = [dots for dots in drawn if dots.before]
    if not drawn:
        return ""
    image = charts.client_dots(drawn, label="Accuracy of every client on its own test data by strategy")
    after = ", above before and below after one more local round" if any(dots.after for dots in drawn) else ""
    return figure(f"Clients on their own test data{after}; line: mean, dashes: worst tenth", image)


def _by_expert(rows: Sequence[Row]) -> str:
    drawn = []
    for name, number, runs in rows:
        loads = [
            sorted((count / one.rounds for row in one.load for count in row), reverse=True)
            for one in runs
            if one.rounds
        ]
        if loads:
            means = [sum(values) / len(values) for values in zip(*loads, strict=True)]
            points = [(float(rank), value) for rank, value in enumerate(means, start=1)]
            drawn.append(Curve(name=name, number=number, points=points))
    if not drawn:
        return ""
    image = charts.curves(
        drawn,
        label="Clients that train an expert in a round, experts by popularity",
        across_is="expert, the most trained first",
        write_x=lambda x: f"{x:g}",
        write_y=lambda count: f"{count:.3g}",
        dots=False,
        whole=True,
    )
    return figure("Clients per expert and round: mean of the seeds", image)


# --------------------------------------------------------------------------------------------------- at the end


def _terms(design: Design, tables: Sequence[Table]) -> str:
    terms = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(meaning)}</dd>"
        for name, meaning in glossary(design, shown_metrics(tables, METRICS))
    )
    return section("What the columns mean", "", f'<dl class="terms">{terms}</dl>') if terms else ""


def _measured(design: Design, outcomes: Sequence[Outcome]) -> str:
    """What depends on the machine."""
    rows = []
    for setting in map(show_setting, design.settings):
        for number, strategy in enumerate(design.strategies):
            runs = [one for one in outcomes if (one.strategy, one.setting) == (strategy, setting)]
            cells = [
                estimate([v for one in runs if (v := one.measured[metric.key]) is not None]) for metric in MEASURED
            ]
            told = [write_value(m, c.mean) if c else MISSING for m, c in zip(MEASURED, cells, strict=True)]
            rows.append([key(strategy, number), *([escape(setting)] if setting else []), *told])
    headings = ["Strategy", *(["Setting"] if any(design.settings) else []), *(f"*{one.title}" for one in MEASURED)]
    intro = "Measured while the runs shared a machine, so not the same twice: means over seeds. " + " ".join(
        f"{one.title}: {one.meaning}." for one in MEASURED
    )
    return section("On this machine", intro, table(headings, rows))
