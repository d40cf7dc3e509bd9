"""What each tier was allowed, and what it held, trained and sent."""

from collections.abc import Mapping

from hfedmoe_ray.tracking import charts
from hfedmoe_ray.tracking.charts import Bullet
from hfedmoe_ray.tracking.formatting import MISSING, against, decimal, percent, short, size
from hfedmoe_ray.tracking.markup import figure, section, table
from hfedmoe_ray.tracking.record import RunRecord
from hfedmoe_ray.tracking.sections.pieces import accuracies, group, tier_key, told, training
from hfedmoe_ray.tracking.tiers import TierStatistics, by_tier, mean

ALONE = ["*After a local round"]
"""Heading of the clients' accuracy after they trained by themselves, where it was measured."""


def budgets(run: RunRecord) -> str:
    """What each tier was allowed, held, trained and sent."""
    rows = by_tier(training(run), run.tiers)
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
            group=group(run, tier),
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
        [(tier, group(run, tier), (row.bytes_up, row.bytes_down)) for tier, row in rows.items()],
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
    own, personalised = accuracies(run), accuracies(run, "personalised")
    predicted = {tier: mib * 2**20 for tier, mib in run.predicted_mib.items()}
    cells = []
    for tier, row in rows.items():
        members = [client for client in run.clients if client.tier == tier]
        values, after = ([by[one.client] for one in members if one.client in by] for by in (own, personalised))
        cells.append(
            [
                tier_key(run, tier),
                str(len(members)),
                f"{mean([client.samples for client in members]):.0f}",
                decimal(row.loss),
                f"{row.seconds:.1f} s",
                size(row.peak_mib * 2**20) if row.peak_mib else MISSING,
                *([against(predicted.get(tier), row.peak_mib * 2**20)] if predicted else []),
                percent(mean(values) if values else None),
                *([percent(mean(after) if after else None)] if personalised else []),
                told(row.statuses),
            ]
        )
    headings = ["Tier", "*Clients", "*Examples each", "*Training loss", "*Time", "*Peak memory"]
    headings += ["*Predicted"] if predicted else []
    return table([*headings, "*Own accuracy", *ALONE[: bool(personalised)], "Results"], cells)
