"""What a run tells Ray can be scraped from its node, and the dashboard asks for nothing else."""

import json
import re
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
import ray
from small_run import REPOSITORY
from tiny_federation import experiment

from hfedmoe_ray.runtime.federate import federate
from hfedmoe_ray.runtime.metrics import CLIENTS, COUNTERS, GAUGES, PHASE_SECONDS, RayMetrics
from hfedmoe_ray.runtime.pool import RayExecutor

pytestmark = pytest.mark.ray
EXPORT_S = 30.0
"""Ray sends what a process has noted every second here, every ten seconds by default."""


def scraped(names: set[str], last_round: int) -> dict[str, float]:
    """What the node offers, by name and labels of our own, once the last round and all the names are there."""
    node = ray.nodes()[0]
    until = time.monotonic() + EXPORT_S
    while True:
        with urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found = {}
        for name, labels, value in re.findall(r"^ray_(hfedmoe_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            own = re.findall(r'\b(run|phase|tier|status)="([^"]*)"', labels)
            found[" ".join([name, *(f"{key}={word}" for key, word in sorted(own))])] = float(value)
        there = {key.partition(" ")[0] for key in found}
        if found.get("hfedmoe_round run=scraped") == last_round and names <= there:
            return found
        assert time.monotonic() < until, f"after {EXPORT_S} s there is {found}"
        time.sleep(0.5)


@pytest.mark.usefixtures("cluster")
def test_a_run_can_be_scraped_from_its_node(sources: Path, tmp_path: Path):
    made = experiment(sources, backend="ray", tracking={"wandb": {"mode": "disabled"}})
    summary = federate(
        made,
        tmp_path,
        resume=False,
        make_executor=RayExecutor,
        render=lambda *_: None,
        should_stop=lambda: False,
        further=[RayMetrics("scraped")],
    )
    found = scraped({*GAUGES, PHASE_SECONDS, CLIENTS, *COUNTERS} - {"hfedmoe_retries_total"}, 2)  # nothing is retried
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert found["hfedmoe_rounds run=scraped"] == 2
    assert found["hfedmoe_round run=scraped"] == lines[-1]["round"] == 2
    assert found["hfedmoe_accuracy run=scraped"] == pytest.approx(summary["accuracy"])
    assert found["hfedmoe_bytes_up_total run=scraped"] == summary["bytes_up"]
    assert found["hfedmoe_bytes_down_total run=scraped"] == summary["bytes_down"]
    assert found["hfedmoe_clients_running run=scraped"] == 0
    assert found["hfedmoe_phase_seconds phase=train run=scraped"] == pytest.approx(lines[-1]["phases"]["train"])
    counted = [value for key, value in found.items() if key.startswith(CLIENTS) and "status=ok" in key]
    assert sum(counted) == summary["clients"]["ok"]
    (node,) = lines[-1]["nodes"]
    assert 0 < node["cpu_percent"] <= 100
    assert 0 < node["memory_percent"] < 100


def test_the_dashboard_asks_for_metrics_that_exist():
    dashboard = json.loads((REPOSITORY / "cluster" / "grafana" / "hfedmoe.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [one["query"]["query"] for one in dashboard["templating"]["list"] if one["type"] == "query"]
    asked = {name for expression in expressions for name in re.findall(r"\bray_(\w+)", expression)}
    ours = {*GAUGES, *COUNTERS, PHASE_SECONDS, CLIENTS}
    assert {name for name in asked if name.startswith("hfedmoe")} == ours
    assert asked - ours <= {"node_cpu_utilization", "node_gpus_utilization"}, "Ray's own"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
