"""Server optimizers: equal to torch.optim's, still where nobody contributed, the same after a killed server."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up_updates import EXPERTS, KEYS, LAYERS, PLAN, ROUTERS, update, weights
from tiny_federation import experiment, run

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.config.server import ServerOptimizer as Config
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.federation.checkpoint import load_checkpoint, run_identity
from hfedmoe_ray.strategies.aggregation import Reducer
from hfedmoe_ray.strategies.rules import RuleSet, TrainedExperts, WithTheirExpert
from hfedmoe_ray.strategies.server import ServerOptimizer
from hfedmoe_ray.types import ExpertKey

OPTIMIZERS = ["fedavgm", "fedadam", "fedyogi"]


def averaged(old, updates, rules=None):
    reducer = Reducer(old=old, router_layers=ROUTERS, layers=LAYERS, rules=rules or RuleSet())
    for one in updates:
        reducer.add(one, PLAN)
    return reducer.result(), reducer.rows


def stepped(optimizer, rounds):
    """The weights after each of some rounds in which one client trains everything, and the averages they followed."""
    current, everything, means = weights(), [weights()], []
    for round in range(rounds):
        mean, rows = averaged(current, [update(0, KEYS, seed=round + 1)])
        current = optimizer.step(current, mean, rows)
        everything.append(current)
        means.append(mean)
    return everything, means


def flat(one):
    arrays = [one.shared[name] for name in sorted(one.shared)] + [one.experts[key]["w"] for key in KEYS]
    return torch.tensor(np.concatenate([array.ravel() for array in arrays]), dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "make"),
    [
        (
            {"optimizer": "fedavgm", "learning_rate": 0.7, "momentum": 0.8},
            lambda parameter: torch.optim.SGD([parameter], lr=0.7, momentum=0.8),
        ),
        ({"optimizer": "fedavgm"}, lambda parameter: torch.optim.SGD([parameter], lr=1.0, momentum=0.9)),
        (
            {"optimizer": "fedadam", "learning_rate": 0.05, "momentum": 0.8, "beta2": 0.95, "tau": 0.01},
            lambda parameter: torch.optim.Adam([parameter], lr=0.05, betas=(0.8, 0.95), eps=0.01),
        ),
        (
            {"optimizer": "fedadam"},
            lambda parameter: torch.optim.Adam([parameter], lr=0.01, betas=(0.9, 0.99), eps=1e-3),
        ),
    ],
    ids=str,
)
def test_a_step_is_that_of_torch_on_old_minus_average(options, make):
    everything, means = stepped(ServerOptimizer(Config(**options), {}), 5)
    parameter = torch.nn.Parameter(flat(everything[0]))
    reference = make(parameter)
    if options["optimizer"] == "fedadam":
        tau = options.get("tau", 1e-3)
        # So late a step has no bias left to correct: beta^1e9 is 0.
        reference.state[parameter] = {
            "step": torch.tensor(1e9),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.full_like(parameter, tau**2),
        }
    for before, mean, after in zip(everything, means, everything[1:], strict=False):
        parameter.grad = flat(before) - flat(mean)
        reference.step()
        torch.testing.assert_close(flat(after), parameter.detach(), rtol=1e-4, atol=1e-6)


def test_yogi_is_its_recurrence_number_by_number():
    everything, means = stepped(ServerOptimizer(Config(optimizer="fedyogi"), {}), 4)
    x, m, v = (float(flat(everything[0])[0]), 0.0, 1e-6)
    for before, mean, after in zip(everything, means, everything[1:], strict=False):
        delta = float(flat(mean)[0] - flat(before)[0])
        m = 0.9 * m + 0.1 * delta
        v = v - 0.01 * delta**2 * (1 if v > delta**2 else -1)
        x = x + 0.01 * m / (v**0.5 + 1e-3)
        assert float(flat(after)[0]) == pytest.approx(x, rel=1e-4)


def test_mean_is_the_average_itself():
    state = {}
    mean, rows = averaged(weights(), [update(0, KEYS[:3])])
    assert ServerOptimizer(Config(), state).step(weights(), mean, rows) is mean
    assert not state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_nobody_contributed_to_keeps_its_bits_and_its_moments(name):
    state = {}
    optimizer = ServerOptimizer(Config(optimizer=name), state)
    rules = RuleSet(routers=WithTheirExpert(experts=TrainedExperts()))
    current = weights()
    current = optimizer.step(current, *averaged(current, [update(0, KEYS)], rules))
    kept = {name: value.copy() for name, value in state.items()}
    assert len(kept) == (1 if name == "fedavgm" else 2) * (len(KEYS) + len(current.shared))
    new = optimizer.step(current, *averaged(current, [update(1, KEYS[:3])], rules))
    for key in KEYS:
        moved = key in KEYS[:3]
        assert (new.experts[key]["w"] is not current.experts[key]["w"]) == moved
        for moment in ("m", "v")[: 1 + (name != "fedavgm")]:
            path = f"{moment}/expert/{key.layer}.{key.expert}/w"
            assert (state[path] != kept[path]).any() == moved
    for router, layer in ROUTERS.items():
        for expert in range(EXPERTS):
            moved = ExpertKey(layer, expert) in KEYS[:3]
            assert (new.shared[router][expert] != current.shared[router][expert]).any() == moved
            assert (state[f"m/shared/{router}"][expert] != kept[f"m/shared/{router}"][expert]).any() == moved


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equal_weights_stay_where_they_are(name):
    """Old equals average: without momentum nothing moves."""
    same = replace(update(0, KEYS), experts=weights().experts, shared=weights().shared)
    old = weights()
    new = ServerOptimizer(Config(optimizer=name), {}).step(old, *averaged(old, [same]))
    torch.testing.assert_close(flat(new), flat(old), rtol=0, atol=0)


def test_a_killed_server_goes_on_with_its_moments(sources: Path, tmp_path: Path):
    changes = {"evaluate": {"own": "never", "every": 9}, "server": {"optimizer": "fedadam"}}
    made = experiment(sources, strategy="fedmoe", **changes)
    whole, undisturbed, recorder = run(made, tmp_path / "whole")
    run(made, tmp_path / "cut", stop_after=1)
    cut, resumed, _ = run(made, tmp_path / "cut", resume=True)
    assert resumed["model_sha256"] == undisturbed["model_sha256"]
    first, second = (
        load_checkpoint(context.run_dir / "checkpoints", run_identity(context)).server for context in (whole, cut)
    )
    assert set(first) == set(second)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])
    trained = {
        f"{layer}.{expert}"
        for layer, expert in zip(*np.nonzero(sum(np.array(r.selected) for r in recorder.rounds)), strict=True)
    }
    assert {name.split("/")[2] for name in first if "/expert/" in name} == trained


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["server.momentum=0.5"], "`optimizer: mean` has no momentum"),
        (["server.optimizer=fedavgm", "server.beta2=0.5"], "fedavgm has no beta2"),
        (["server.optimizer=adam"], "Did you mean fedadam?"),
        (["server.optimizer=fedadam", "server.tau=0"], "must be greater than 0"),
        (["server.optimizer=fedyogi", "model.lora={}"], "write `model.lora.average: factors`"),
        (["server.optimizer=fedadam", "strategy=local"], "nothing for `server` to do"),
    ],
)
def test_what_makes_no_sense_is_refused(quickstart, overrides, said):
    with pytest.raises(ConfigError) as refused:
        load_experiment(quickstart, overrides)
    assert said in str(refused.value)
    assert load_experiment(quickstart, ["server.optimizer=fedyogi", "model.lora={average: factors}"]).server.tau is None
