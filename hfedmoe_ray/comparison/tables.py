"""The tables of a comparison, as Markdown and as LaTeX: the same figures, marked the same way.

They hold nothing that was measured on a machine, so two comparisons with the same seeds give the same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hfedmoe_ray.comparison.design import Design, show_setting
from hfedmoe_ray.comparison.outcome import GROUPS, METRICS, Metric, Outcome
from hfedmoe_ray.comparison.statistics import Estimate, PairedTest, best_of, compare_with, estimate
from hfedmoe_ray.tracking.formatting import MISSING, percent, plural

SIGNIFICANT = 0.05
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "_": r"\_",
    "&": r"\&",
    "%": r"\%",
    "#": r"\#",
    "$": r"\$",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "²": r"\textsuperscript{2}",
    "–": "--",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"\textbar{}",
}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One strategy by one metric in one setting."""

    values: Mapping[int, float]
    """By seed, of the runs that have one."""
    runs: int
    """Runs that finished."""
    estimate: Estimate | None
    best: bool
    test: PairedTest | None
    """Against the best; None for the best itself, and with fewer than two seeds."""

    @property
    def worse(self) -> bool:
        """Whether it differs from the best by more than chance explains."""
        return self.test is not None and self.test.p_holm < SIGNIFICANT


@dataclass(frozen=True, kw_only=True)
class Table:
    """One setting: a row per strategy, a cell per metric."""

    setting: str
    rows: Mapping[str, Mapping[str, Cell]]
    """By strategy and the key of a metric."""


def make_tables(design: Design, outcomes: Sequence[Outcome]) -> list[Table]:
    """Returns a table for each setting, its strategies in the order of the design."""
    return [_table(design, show_setting(setting), outcomes) for setting in design.settings]


def _table(design: Design, setting: str, outcomes: Sequence[Outcome]) -> Table:
    rows: dict[str, dict[str, Cell]] = {strategy: {} for strategy in design.strategies}
    here = {s: [one for one in outcomes if (one.strategy, one.setting) == (s, setting)] for s in design.strategies}
    for metric in METRICS:
        values = {
            strategy: {one.seed: value for one in found if (value := one.figures[metric.key]) is not None}
            for strategy, found in here.items()
        }
        best = best_of(values, metric.better) if metric.better else None
        tests = compare_with(best, values) if best else {}
        for strategy, by_seed in values.items():
            rows[strategy][metric.key] = Cell(
                values=by_seed,
                runs=len(here[strategy]),
                estimate=estimate([by_seed[seed] for seed in sorted(by_seed)]),
                best=strategy == best,
                test=tests.get(strategy),
            )
    return Table(setting=setting, rows=rows)


def shown_metrics(tables: Sequence[Table], group: Sequence[Metric]) -> list[Metric]:
    """The metrics of a group that some run has."""
    return [
        metric
        for metric in group
        if any(cells[metric.key].estimate for table in tables for cells in table.rows.values())
    ]


def write_value(metric: Metric, value: float) -> str:
    """A value as tables write it: shares in percent, bytes in MiB, without their units."""
    match metric.unit:
        case "share":
            return f"{100 * value:.1f}"
        case "share²":
            return f"{1e4 * value:.0f}"
        case "bytes":
            return f"{value / 2**20:.1f}"
        case "number":
            return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"


def write_cell(metric: Metric, cell: Cell) -> str:
    """Mean ± half of the interval, and of how many runs where not all have a value."""
    if cell.estimate is None:
        return MISSING
    told = write_value(metric, cell.estimate.mean)
    if cell.estimate.half_width is not None:
        told += f" ± {write_value(metric, cell.estimate.half_width)}"
    return told if cell.estimate.n == cell.runs else f"{told} ({cell.estimate.n} of {cell.runs})"


def heading(metric: Metric) -> str:
    """A metric's title with its unit."""
    return metric.title + {"share": " (%)"}.get(metric.unit, "")


def reading(design: Design, best: str = "bold") -> str:
    """How the tables are to be read; `best` is how the best is marked."""
    n = len(design.seeds)
    told = f"Means over {plural(n, 'seed')} ({', '.join(map(str, design.seeds))})"
    if n == 1:
        return f"{told}: one run each, so neither intervals nor tests."
    return (
        f"{told} ± half of the 95 % interval (Student's t). In {best}: the best mean. *: differs from the best, "
        f"paired t test over seeds, p < {SIGNIFICANT} after Holm's correction for all strategies of the setting. With "
        f"{n} seeds a missing star is no evidence of equality."
    )


def glossary(design: Design, metrics: Sequence[Metric]) -> list[tuple[str, str]]:
    """What each column means."""
    target = f"; the target is {percent(design.target)}" if design.target is not None else ""
    return [(metric.title, metric.meaning + (target if metric.key == "rounds_to_target" else "")) for metric in metrics]


# ------------------------------------------------------------------------------------------------------ Markdown


def markdown(design: Design, tables: Sequence[Table], failures: Sequence[str]) -> str:
    """Returns the tables as Markdown."""
    lines = [f"# {design.name}", "", reading(design), ""]
    for table in tables:
        lines += [f"## {_plain(table.setting)}", ""] if table.setting else []
        for title, group in GROUPS:
            metrics = shown_metrics(tables, group)
            if not metrics:
                continue
            lines += [
                f"### {title}",
                "",
                "| strategy | n | " + " | ".join(heading(metric) for metric in metrics) + " |",
            ]
            lines += ["|---|--:|" + "--:|" * len(metrics)]
            for strategy, cells in table.rows.items():
                told = [_markdown_cell(metric, cells[metric.key]) for metric in metrics]
                lines += [f"| {_plain(strategy)} | {cells[metrics[0].key].runs} | " + " | ".join(told) + " |"]
            lines += [""]
    lines += [f"- **{name}**: {meaning}" for name, meaning in glossary(design, shown_metrics(tables, METRICS))]
    if failures:
        lines += ["", "Runs that failed, and are missing above:", "", *(f"- {_plain(one)}" for one in failures)]
    return "\n".join(lines) + "\n"


def _markdown_cell(metric: Metric, cell: Cell) -> str:
    text = write_cell(metric, cell)
    return f"**{text}**" if cell.best else f"{text} \\*" if cell.worse else text


def _plain(text: str) -> str:
    """Text that Markdown leaves alone."""
    for letter in "\\|*_[]<`":
        text = text.replace(letter, f"\\{letter}")
    return " ".join(text.split())


# --------------------------------------------------------------------------------------------------------- LaTeX


def latex(design: Design, tables: Sequence[Table]) -> str:
    """Returns the tables as LaTeX, to be included as it is; needs the package booktabs."""
    parts = ["% Needs \\usepackage{booktabs}.", f"% {' '.join(design.name.split())}"]
    for table in tables:
        for title, group in GROUPS:
            metrics = shown_metrics(tables, group)
            if metrics:
                parts.append(_latex_table(design, table, metrics, title))
    return "\n".join(parts) + "\n"


def _latex_table(design: Design, table: Table, metrics: Sequence[Metric], what: str) -> str:
    where = f" ({escape_latex(table.setting)})" if table.setting else ""
    lines = [
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{what}{where}. {escape_latex(reading(design))}}}",
        rf"  \begin{{tabular}}{{l{'r' * (1 + len(metrics))}}}",
        r"    \toprule",
        "    Strategy & $n$ & " + " & ".join(escape_latex(heading(metric)) for metric in metrics) + r" \\",
        r"    \midrule",
    ]
    for strategy, cells in table.rows.items():
        told = [_latex_cell(metric, cells[metric.key]) for metric in metrics]
        # Braces: a row that began with [ or * would be read as an option of the line break before it.
        first = f"{{{escape_latex(strategy)}}} & {cells[metrics[0].key].runs}"
        lines.append(f"    {first} & " + " & ".join(told) + r" \\")
    return "\n".join([*lines, r"    \bottomrule", r"  \end{tabular}", r"\end{table}"])


def _latex_cell(metric: Metric, cell: Cell) -> str:
    text = escape_latex(write_cell(metric, cell))
    return rf"\textbf{{{text}}}" if cell.best else f"{text}$^{{*}}$" if cell.worse else text


def escape_latex(text: str) -> str:
    """Text as LaTeX prints it."""
    return "".join(_LATEX.get(letter, letter) for letter in text)
