"""The attack on the choice of experts: it sees what a run's server sees, and the study tells what it found."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_federation import experiment, run

from hfedmoe_ray.cli import main
from hfedmoe_ray.config.load import dump_experiment
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.federation.checkpoint import load_checkpoint, run_identity
from hfedmoe_ray.studies import selection_privacy
from hfedmoe_ray.studies.inference import Client, Victims, baseline, success, victims
from hfedmoe_ray.types import RoutingProfile


@pytest.fixture(scope="module")
def made(sources: Path) -> Experiment:
    base = experiment(sources)
    return experiment(
        sources,
        rounds=1,
        strategy={"name": "hfedmoe", "unselected": "reroute", "explore": 0.0},
        clients={"count": 6, "per_round": 4, "tiers": [{"name": "phone", "share": 1.0, "experts": 0.34}]},
        data=base.data.model_dump() | {"test_examples": 60, "partition": {"how": "dirichlet", "alpha": 0.3}},
        evaluate={"own": "never"},
    )


def test_the_attack_is_given_the_profiles_that_the_server_has(made: Experiment, tmp_path: Path):
    context, _, _ = run(
        made.model_copy(update={"clients": made.clients.model_copy(update={"per_round": None})}), tmp_path
    )
    at_start = load_checkpoint_of_round_0(context.run_dir, run_identity(context))
    found = victims(context, 20)
    assert len(found.shadows) >= 20
    for client, attacked in enumerate(found.clients):
        for name in ("usage", "specific", "kl", "routed"):
            own = getattr(at_start[client], name)
            np.testing.assert_allclose(getattr(attacked.profile, name), own, rtol=1e-5, atol=1e-6)
        counts = context.data.counts[client]
        assert counts[attacked.dominant] == max(counts)


def load_checkpoint_of_round_0(run_dir: Path, identity: str) -> dict[int, RoutingProfile]:
    latest = run_dir / "checkpoints" / "LATEST"
    latest.write_text("round-0000\n")
    return load_checkpoint(run_dir / "checkpoints", identity).profiles


def test_the_attack_finds_what_is_there_and_nothing_where_nothing_is():
    rng = np.random.default_rng(0)

    def clients(count: int) -> list[Client]:
        classes = rng.integers(4, size=count)
        usage = [np.eye(4)[c][None] + rng.normal(scale=0.2, size=(1, 4)) for c in classes]
        zeros = np.zeros((1, 4))
        return [
            Client(profile=RoutingProfile(usage=u, specific=u, kl=zeros, routed=zeros, tokens=9), dominant=int(c))
            for u, c in zip(usage, classes, strict=True)
        ]

    found = Victims(clients=clients(200), shadows=clients(400))
    assert success(found, lambda profile, _: profile.usage.ravel()) > 0.95
    assert success(found, lambda _, number: np.random.default_rng(number).normal(size=4)) < 0.4
    assert baseline(replace(found, clients=[c for c in found.clients if c.dominant == 0])) in (0.0, 1.0)


def test_the_study_tells_attack_and_accuracy_of_each_defence(
    made: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    config = tmp_path / "tiny.yaml"
    config.write_text(dump_experiment(made))
    monkeypatch.setattr(selection_privacy, "SHADOWS", 30)
    monkeypatch.setattr(selection_privacy, "DEFENCES", {"response, ε 4": ("response", 4.0), "usage": ("usage", 10.0)})
    options = ["--processes", "1", "--seeds", "0", "--output", str(tmp_path / "out")]
    assert main(["study", "selection_privacy", str(config), *options]) == 0
    attacked = json.loads((tmp_path / "out" / "selection_privacy.json").read_text())["numbers"]["attacked"]
    assert list(attacked) == ["nothing", *(f"k-contributors, k = {k}" for k in (2, 3, 5)), "response, ε 4", "usage"]
    assert all(0 <= one["plan"]["mean"] <= 1 for one in attacked.values())
    assert all(0 <= one["accuracy"]["mean"] <= 1 for one in attacked.values())
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 6
