"""The files of a comparison: comparison.json, .md, .tex and .html, written whole or not at all."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hfedmoe_ray.comparison.design import Design, show_setting
from hfedmoe_ray.comparison.outcome import MEASURED, METRICS, Outcome, read_outcome
from hfedmoe_ray.comparison.page import render
from hfedmoe_ray.comparison.running import Failure, stage_of
from hfedmoe_ray.comparison.statistics import CONFIDENCE
from hfedmoe_ray.comparison.tables import Table, latex, make_tables, markdown
from hfedmoe_ray.tracking.jsonl import dumps, write_atomic

JSON, MARKDOWN, LATEX, HTML = "comparison.json", "comparison.md", "comparison.tex", "comparison.html"


def read_outcomes(design: Design) -> list[Outcome]:
    """Reads the runs of a design that are finished, in its order."""
    return [
        read_outcome(run.directory, strategy=run.strategy, setting=show_setting(run.setting), seed=run.seed)
        for run in design.runs
        if stage_of(run) == "finished"
    ]


def write_comparison(design: Design, failures: Sequence[Failure]) -> Path:
    """Writes all files from the runs that are finished; returns the directory."""
    outcomes = read_outcomes(design)
    tables = make_tables(design, outcomes)
    told = [f"{one.run.experiment.name}: {one.reason}" for one in failures]
    design.directory.mkdir(parents=True, exist_ok=True)
    values = {
        "name": design.name,
        "strategies": design.strategies,
        "settings": [dict(setting) for setting in design.settings],
        "seeds": design.seeds,
        "confidence": CONFIDENCE,
        "metrics": [asdict(metric) for metric in METRICS],
        "table": [_plain(table) for table in tables],
        "runs": [_run(one) for one in outcomes],
        "failed": told,
        # Measured on a machine: the only part that two comparisons do not share.
        "measured": {one.name: one.measured for one in outcomes},
        "measured_metrics": [asdict(metric) for metric in MEASURED],
    }
    write_atomic(design.directory / JSON, dumps(values, indent=1) + "\n")
    write_atomic(design.directory / MARKDOWN, markdown(design, tables, told))
    write_atomic(design.directory / LATEX, latex(design, tables))
    write_atomic(design.directory / HTML, render(design, tables, outcomes, told))
    return design.directory


def _plain(table: Table) -> dict[str, Any]:
    rows = {
        strategy: {
            key: {
                "values": cell.values,
                "mean": cell.estimate.mean if cell.estimate else None,
                "half_width": cell.estimate.half_width if cell.estimate else None,
                "n": cell.estimate.n if cell.estimate else 0,
                "best": cell.best,
                "test": asdict(cell.test) if cell.test else None,
            }
            for key, cell in cells.items()
        }
        for strategy, cells in table.rows.items()
    }
    return {"setting": table.setting, "rows": rows}


def _run(one: Outcome) -> dict[str, Any]:
    return {key: value for key, value in asdict(one).items() if key != "measured"}
