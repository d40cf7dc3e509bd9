"""A round as named numbers: the same names in W&B, TensorBoard and MLflow."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfedmoe_ray.records import NodeUsage, RoundReport
from hfedmoe_ray.tracking.files import METRICS
from hfedmoe_ray.tracking.jsonl import read_lines
from hfedmoe_ray.tracking.tiers import by_tier
from hfedmoe_ray.types import Status

STATUSES: tuple[Status, ...] = ("ok", "late", "failed", "memory", "rejected", "dropped")
_MIB = 2.0**20


class RoundScalars:
    """Names the numbers of rounds, with totals over those before, in this process or in the record of the run."""

    def __init__(self, run_dir: Path, tiers: Sequence[str], resumed_from: int | None) -> None:
        """Args: the run's directory, its tiers in order, and the last round it has before this process, if any."""
        self._tiers = tuple(tiers)
        self._bytes: dict[int, float] = {}
        self._simulated: dict[int, float | None] = {}
        for line in read_lines(run_dir / METRICS) if resumed_from is not None else ():
            self._count(line["round"], line["bytes_up"] + line["bytes_down"], line.get("simulated_seconds"))

    def of(self, report: RoundReport) -> dict[str, float]:
        """The numbers of a round by name. What was not measured in this round is left out."""
        self._count(report.round, report.bytes_up + report.bytes_down, report.simulated_seconds)
        statuses = Counter(client.status for client in report.clients)
        simulated = [seconds for number, seconds in self._simulated.items() if number <= report.round]
        numbers: dict[str, float | None] = {
            "round": report.round,
            "global/accuracy": report.accuracy,
            "global/loss": report.test_loss,
            "attack/backdoor_success": report.backdoor_success,
            "own/accuracy": report.own_accuracy,
            "own/personalised_accuracy": report.personalised_accuracy,
            "train/loss": report.loss,
            "experts/trained": sum(count > 0 for layer in report.selected for count in layer),
            "experts/agreement": report.agreement,
            "experts/participation": report.participation,
            "traffic/up_mib": report.bytes_up / _MIB,
            "traffic/down_mib": report.bytes_down / _MIB,
            "traffic/total_mib": sum(count for number, count in self._bytes.items() if number <= report.round) / _MIB,
            "seconds/round": report.seconds,
            "seconds/simulated": report.simulated_seconds,
            "seconds/simulated_total": None if None in simulated else sum(filter(None, simulated)),
        }
        numbers |= {f"seconds/{phase}": seconds for phase, seconds in report.phases.items()}
        numbers |= {f"clients/{status}": statuses[status] for status in STATUSES}
        for tier, row in by_tier(report.clients, self._tiers).items():
            numbers |= {
                f"tier/{tier}/loss": row.loss,
                f"tier/{tier}/seconds": row.seconds,
                f"tier/{tier}/experts_held": row.resident,
                f"tier/{tier}/experts_trained": row.trained,
                f"tier/{tier}/up_mib": row.bytes_up / _MIB,
                f"tier/{tier}/down_mib": row.bytes_down / _MIB,
            }
        for benchmark, score in report.benchmarks.items():
            numbers |= {f"benchmark/{benchmark}/{field}": value for field, value in score.items() if field != "items"}
        numbers |= {f"privacy/{name}": value for name, value in report.privacy.items() if math.isfinite(value)}
        numbers |= {f"robust/{name}": value for name, value in report.robust.items()}
        for node in report.nodes:
            numbers |= _of_node(node)
        return {name: value for name, value in numbers.items() if value is not None}

    def _count(self, round: int, bytes: float, simulated: float | None) -> None:
        """By round, because the last one may be reported again after a resumption."""
        self._bytes[round], self._simulated[round] = bytes, simulated


def _of_node(node: NodeUsage) -> dict[str, float | None]:
    """What one machine did, in percent."""
    numbers: dict[str, float | None] = {
        f"node/{node.node}/cpu": node.cpu_percent,
        f"node/{node.node}/memory": node.memory_percent,
    }
    for gpu, (busy, memory) in enumerate(zip(node.gpu_percent, node.gpu_memory_percent, strict=True)):
        numbers |= {f"node/{node.node}/gpu{gpu}": busy, f"node/{node.node}/gpu{gpu}_memory": memory}
    return numbers


def tier_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The tiers of a resolved configuration, in order."""
    return tuple(tier["name"] for tier in config["clients"]["tiers"])
