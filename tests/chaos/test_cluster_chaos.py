"""A whole run on three nodes of two sites, one of which is replaced while the run goes on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster
from tiny_federation import Recorder, experiment, run

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.runtime.cluster import connected
from hfedmoe_ray.runtime.pool import RayExecutor

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
SITE_OF = {"phone": "near", "server": "far"}


class Sites:
    """A cluster of a head without CPUs and of nodes with a CPU and a GPU, which is only a number to Ray here."""

    def __init__(self, directory: str) -> None:
        self.cluster = Cluster()
        self.cluster.add_node(num_cpus=0, object_store_memory=2**27, _system_config=QUICK, temp_dir=directory)
        self.site_of: dict[str, str] = {}
        """By node id, those that are lost included."""
        self._directory = directory
        for site in ("near", "far", "far"):
            self.add(site)

    def add(self, site: str) -> str:
        size = {"num_cpus": 1, "num_gpus": 1, "memory": 2**31, "object_store_memory": 2**27}
        node = self.cluster.add_node(**size, labels={"site": site}, temp_dir=self._directory)
        self.site_of[node.node_id] = site
        return str(node.node_id)

    def lose(self, node_id: str) -> None:
        lost = next(node for node in self.cluster.worker_nodes if node.node_id == node_id)
        self.cluster.remove_node(lost, allow_graceful=False)


@pytest.fixture
def sites(ray_directory: str) -> Iterator[Sites]:
    made = Sites(ray_directory)
    with connected(made.cluster.address):
        yield made
    made.cluster.shutdown()


class Replacing(Recorder):
    """Replaces the near site's node as soon as it has been given a task of round 2."""

    def __init__(self, sites: Sites) -> None:
        super().__init__()
        self._sites = sites
        self.node_of: dict[int, str] = {}
        """Where each slot is."""
        self.served: list[tuple[int, int, str]] = []
        """(round, client, node) of every task that is the client's own."""
        self.lost = ""

    def event(self, name: str, fields: Any) -> None:
        super().event(name, fields)
        if name == "slot_ready":
            self.node_of[fields["slot"]] = fields["node"]
        if name == "task_started" and fields["kind"] != "evaluate":  # a slice of the test set is anybody's work
            node = self.node_of[fields["slot"]]
            self.served.append((fields["round"], fields["client"], node))
            if (fields["round"], self._sites.site_of[node], self.lost) == (2, "near", ""):
                self.lost = node
                self._sites.add("near")
                self._sites.lose(node)


def made(sources: Path, backend: str) -> Experiment:
    """Phones need half a GPU of the near site, servers a whole one of the far site."""
    tiers = [
        {"name": "phone", "share": 0.5, "experts": 0.25, "device": 0.5, "labels": {"site": "near"}},
        {"name": "server", "share": 0.5, "experts": 0.5, "device": 1, "labels": {"site": "far"}},
    ]
    wire = {"upload": "topk", "share": 0.05}
    return experiment(sources, clients={"count": 6, "tiers": tiers}, rounds=3, wire=wire, backend=backend)


def test_a_run_outlives_the_replacement_of_a_node_and_its_clients_stay_at_their_sites(
    sources: Path, tmp_path: Path, sites: Sites
):
    alone = run(made(sources, "local"), tmp_path / "local")[1]
    told = Replacing(sites)
    _, summary, _ = run(made(sources, "ray"), tmp_path / "ray", where=RayExecutor, recorder=told)
    assert summary["model_sha256"] == alone["model_sha256"]
    assert summary["clients"] == alone["clients"]
    ready = [fields for name, fields in told.events if name == "slot_ready"]
    for fields in ready:
        assert {SITE_OF[tier] for tier in fields["tiers"]} == {sites.site_of[fields["node"]]}
    for round, client, node in told.served:
        assert sites.site_of[node] == SITE_OF[told.facts["clients"][client]["tier"]], f"client {client}, round {round}"
    assert {fields["node"] for fields in ready} == {*sites.site_of}, "a node was not used"
    (retried,) = [fields for name, fields in told.events if name == "task_retried"]
    assert retried["round"] == 2
    assert told.lost not in {node for round, _, node in told.served if round == 3}
