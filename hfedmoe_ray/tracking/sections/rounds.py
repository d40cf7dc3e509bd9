"""Every round in numbers, and the configuration."""

from collections import Counter
from html import escape

from hfedmoe_ray.tracking.files import CONFIG
from hfedmoe_ray.tracking.formatting import decimal, duration, percent, size
from hfedmoe_ray.tracking.markup import folded, section, table
from hfedmoe_ray.tracking.record import RunRecord
from hfedmoe_ray.tracking.sections.pieces import told, trained_experts
from hfedmoe_ray.tracking.thinning import thinned

_MOST_ROUNDS, _MOST_OPEN = 200, 30
"""Rows of the table, and those up to which it is not folded."""


def rounds(run: RunRecord) -> str:
    """A row per round."""
    if not run.rounds:
        return ""
    shown = thinned(run.rounds, _MOST_ROUNDS)
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
            told(Counter(client.status for client in report.clients)),
        ]
        for report in shown
    ]
    headings = ["*Round", "*Test accuracy", "*Test loss", "*Training loss", "*Own accuracy", "*Experts", "*Up", "*Down"]
    intro = (
        "Experts: trained by at least one client. Divergence: mean Jensen–Shannon divergence of the clients' expert "
        "usage from their mean, in nats; 0 means that all route alike."
    )
    if len(shown) < len(run.rounds):
        intro += f" {len(shown)} of {len(run.rounds)} rounds, evenly spaced; metrics.jsonl has all."
    numbers = table([*headings, "*Divergence", "*Time", "Results"], cells)
    many = len(shown) > _MOST_OPEN
    return section("All rounds", intro, folded(f"{len(shown)} rounds", numbers) if many else numbers)


def configuration(run: RunRecord) -> str:
    """The configuration the run was started with."""
    text = (run.run_dir / CONFIG).read_text(encoding="utf-8")
    return section("Configuration", "", folded(CONFIG, f"<pre>{escape(text)}</pre>"))
