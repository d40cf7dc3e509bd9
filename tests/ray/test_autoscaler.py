"""A whole run on a cluster that has no place for a client when it starts: Ray's own autoscaler makes the nodes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from autoscaled_cluster import autoscaled
from ray._raylet import GcsClient
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from tiny_federation import experiment

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.runtime import session
from hfedmoe_ray.runtime.cluster import capacity

pytestmark = pytest.mark.ray
SITE_OF = {"phone": "near", "server": "far"}


@pytest.fixture
def address(request: pytest.FixtureRequest, ray_directory: str) -> Iterator[str]:
    """A head node, and an autoscaler that may start one node at each of two sites."""
    request.getfixturevalue("workers_import_tests")
    size = {"CPU": 1, "memory": 2**33, "object_store_memory": 2**27}
    types = {site: {"resources": size, "labels": {"site": site}, "max_workers": 1} for site in SITE_OF.values()}
    with autoscaled(Path(ray_directory), types) as address:
        yield address


def asked_of(address: str) -> dict[str, int]:
    """How many bundles the autoscaler is asked for now, by the site they are to be at."""
    bundles: dict[str, int] = {}
    for constraint in get_cluster_resource_state(GcsClient(address=address)).cluster_resource_constraints:
        for asked in constraint.resource_requests:
            (label,) = asked.request.label_selectors[0].label_constraints
            bundles[label.label_values[0]] = bundles.get(label.label_values[0], 0) + asked.count
    return bundles


class Watching:
    """Keeps what a run tells, where its nodes are, and what the autoscaler is asked for during its rounds."""

    def __init__(self, address: str) -> None:
        self.told: list[tuple[str, Any]] = []
        self.asked: list[dict[str, int]] = []
        self.site_of: dict[str, str | None] = {}
        self._address = address

    def __call__(self, name: str, fields: Any) -> None:
        self.told.append((name, fields))
        if name == "round":
            self.asked.append(asked_of(self._address))
            self.site_of |= {node.node: node.labels.get("site") for node in capacity()}


def made(sources: Path, **where: Any) -> Experiment:
    tiers = [
        {"name": "phone", "share": 0.5, "experts": 0.25, "device": 0.1, "labels": {"site": "near"}},
        {"name": "server", "share": 0.5, "experts": 0.5, "device": 0.1, "labels": {"site": "far"}},
    ]
    return experiment(sources, clients={"count": 4, "tiers": tiers}, rounds=1, **where)


def test_a_run_gets_its_nodes_from_the_autoscaler_and_gives_them_up(sources: Path, tmp_path: Path, address: str):
    alone = session.run(made(sources), tmp_path / "local", resume=False, render=lambda *_: None)
    assert asked_of(address) == {}
    runtime = {"address": address, "scale_up_s": 120}
    watching = Watching(address)
    grown = session.run(made(sources, backend="ray", runtime=runtime), tmp_path / "ray", resume=False, render=watching)
    assert grown["model_sha256"] == alone["model_sha256"]
    assert grown["clients"] == alone["clients"]
    assert watching.asked == [{"near": 2, "far": 2}] * 2, "a round's clients, asked for as long as the run lasts"
    assert asked_of(address) == {}, "released"
    assert [fields["seconds"] for name, fields in watching.told if name == "waiting"] == [120]
    ready = [fields for name, fields in watching.told if name == "slot_ready"]
    assert len({fields["node"] for fields in ready}) == 2
    for fields in ready:
        assert {SITE_OF[tier] for tier in fields["tiers"]} == {watching.site_of[fields["node"]]}
