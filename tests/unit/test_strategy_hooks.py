"""What the server offers any strategy: private routers, signals, and a state that survives the server."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from tiny_federation import experiment, final_weights, run

from hfedmoe_ray import strategies
from hfedmoe_ray.federation.checkpoint import load_checkpoint, run_identity
from hfedmoe_ray.moe.prepare import router_layers
from hfedmoe_ray.strategies.controls import FedAvg


class Learner(FedAvg):
    """FedAvg whose clients keep their routers, and whose server adds up what they measure."""

    private_router = True
    signals = frozenset({"loss", "gradient"})

    def observe(self, round, updates, plans):
        assert updates.keys() == plans.keys()
        for client, update in updates.items():
            assert not update.experts
            for name, value in update.signals.items():
                before = self.state.get(name, np.zeros(self.shape))
                # In place of the old state, not into it: both must reach the checkpoint.
                self.state = self.state | {name: before + value * (client + 1) * round}


@pytest.fixture
def learner(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = dict(strategies._STRATEGIES)
    monkeypatch.setattr(strategies, "_STRATEGIES", dict.fromkeys(configs, Learner))


@pytest.mark.usefixtures("learner")
def test_routers_stay_with_their_clients_and_everything_else_is_averaged(sources: Path, tmp_path: Path):
    context, summary, recorder = run(experiment(sources, strategy="fedavg"), tmp_path / "run")
    weights = final_weights(context)
    routers = set(router_layers(context.model))
    assert sorted(weights.personal) == [0, 1, 2, 3]
    for own in weights.personal.values():
        assert set(own.shared) == routers
        assert not own.experts
    name = min(routers)
    values = [own.shared[name] for own in weights.personal.values()]
    assert all((one != other).any() for one, other in itertools.pairwise(values))
    samples = [record.samples for record in recorder.rounds[-1].clients]
    mean = np.average(np.stack(values).astype(np.float64), axis=0, weights=samples)
    np.testing.assert_array_equal(weights.shared[name], mean.astype(np.float32))
    # The global test split is evaluated once, by the global model.
    assert summary["accuracy"] is not None


@pytest.mark.usefixtures("learner")
def test_what_a_strategy_learns_survives_the_server(sources: Path, tmp_path: Path):
    made = experiment(sources, strategy="fedavg")
    straight, _, _ = run(made, tmp_path / "straight")
    run(made, tmp_path / "broken", stop_after=1)
    resumed, _, _ = run(made, tmp_path / "broken", resume=True)
    first, second = (
        load_checkpoint(context.run_dir / "checkpoints", run_identity(context)).strategy
        for context in (straight, resumed)
    )
    assert set(first) == {"loss", "gradient"}
    for name, value in first.items():
        assert value.shape == (2, 6)
        assert (value > 0).any()
        np.testing.assert_array_equal(second[name], value)
