"""Differential privacy of clients: what it spends, draws and tells, and that without it nothing changes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting import pld, rdp
from made_up_updates import KEYS, update, weights
from pydantic import ValidationError
from tiny_federation import experiment, final_weights, run

from hfedmoe_ray.config.load import dump_experiment
from hfedmoe_ray.config.privacy import Central
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import CheckpointError, ConfigError, TrainingError
from hfedmoe_ray.trust import accounting
from hfedmoe_ray.trust.central import CentralPrivacy, PrivateMean, change, clip
from hfedmoe_ray.trust.noise import source
from hfedmoe_ray.verify import verify_run

NOISY = Central(noise_multiplier=1.0, clip=0.5, delta=1e-3)
STRATEGY = {"name": "hfedmoe", "tau": 0.5, "unselected": "reroute"}
NONE = {"noise_multiplier": 0, "unprotected": True}
LOOSE = {"unprotected": True, "delta": 0.01, "clip": 0.1, "noise_seed": 7}


def tiny(sources: Path, central: dict[str, Any] | None, **changes: Any) -> Experiment:
    own = {"evaluate": {"own": "never"}, "strategy": STRATEGY}
    return experiment(sources, privacy={"central": central}, **(own | changes))


# ---------------------------------------------------------------------------------------------------------- accounting


@pytest.mark.parametrize("name", ["rdp", "pld"])
def test_epsilon_is_the_accountants_own(name: str):
    options = NOISY.model_copy(update={"accountant": name})
    own = {"rdp": rdp.RdpAccountant, "pld": pld.PLDAccountant}[name]()
    for _ in range(3):
        own.compose(dp.PoissonSampledDpEvent(0.25, dp.GaussianDpEvent(1.0)))
    own.compose(dp.GaussianDpEvent(4.0))
    found = accounting.epsilon(options, [(0.25, 1.0)] * 3 + [(1.0, 4.0)])
    assert found == pytest.approx(own.get_epsilon(1e-3), rel=1e-9)


def test_the_noise_is_the_least_that_keeps_to_the_budget():
    options = Central(epsilon=3.0, delta=1e-4, clip=1.0)
    multiplier = accounting.noise_multiplier(options, 0.2, 12)
    assert accounting.epsilon(options, [(0.2, multiplier)] * 12) <= 3.0
    assert accounting.epsilon(options, [(0.2, multiplier - 1e-3)] * 12) > 3.0


def test_an_epsilon_without_meaning_is_refused(sources: Path):
    made = tiny(sources, {"noise_multiplier": 0.3, "clip": 1.0, "delta": 0.01})
    with pytest.raises(ConfigError, match="promises next to nothing"):
        accounting.planned(made)
    assert "epsilon" in accounting.told(tiny(sources, {"epsilon": 4.0, "clip": 1.0, "delta": 0.01}))


@pytest.mark.parametrize(
    ("central", "changes", "message"),
    [
        ({"noise_multiplier": 0}, {}, "protects nobody"),
        ({"epsilon": 50.0, "delta": 1e-3, "clip": 1.0}, {}, "next to nothing"),
        ({"epsilon": 2.0, "noise_multiplier": 1.0, "delta": 1e-3, "clip": 1.0}, {}, "either epsilon"),
        ({"epsilon": 2.0, "delta": 1e-3}, {}, "needs `clip`"),
        ({"epsilon": 2.0, "clip": 1.0}, {}, "needs `delta`"),
        ({"epsilon": 2.0, "clip": 1.0, "delta": 0.25}, {}, "publishing one of them whole"),
        ({"epsilon": 2.0, "clip": 1.0, "delta": 0.01}, {"strategy": "flux"}, "strategy flux"),
        ({"epsilon": 2.0, "clip": 1.0, "delta": 0.01}, {"strategy": "hfedmoe"}, "mean outputs"),
        ({"epsilon": 2.0, "clip": 1.0, "delta": 0.01}, {"rules": {"shared": "uniform"}}, "nothing for `rules`"),
        ({"epsilon": 2.0, "clip": 1.0, "delta": 0.01}, {"evaluate": {"own": "final"}}, "evaluate.own: never"),
        (
            {"epsilon": 2.0, "clip": 1.0, "delta": 0.01},
            {"strategy": STRATEGY | {"coverage": 0.5}},
            "profiles of others",
        ),
    ],
)
def test_what_the_promise_would_not_hold_with_is_refused(
    sources: Path, central: dict[str, Any], changes: dict[str, Any], message: str
):
    with pytest.raises(ValidationError, match=message):
        tiny(sources, central, **changes)


# ----------------------------------------------------------------------------------------------------------- mechanism


@pytest.mark.parametrize("seed", [None, 3])
def test_noise_has_the_stated_variance_on_every_number(seed: int | None):
    old = replace(
        weights(),
        shared={"head": np.zeros((300, 200), np.float64)},
        experts={key: {"w": np.zeros((20, 100), np.float64)} for key in KEYS},
    )
    mean = PrivateMean(old, NOISY, expected=5)
    drawn = [mean.result(NOISY.clip * 1.0, source(seed, "test", number)) for number in range(2)]
    numbers = [
        np.concatenate([one.shared["head"].ravel(), *(t["w"].ravel() for t in one.experts.values())]) for one in drawn
    ]
    sigma = 1.0 * 0.5 / 5
    for values in numbers:
        count = len(values)
        assert abs(values.mean()) < 5 * sigma / count**0.5
        assert abs(values.var() / sigma**2 - 1) < 5 * (2 / count) ** 0.5
        assert abs(((values / sigma) ** 4).mean() - 3) < 5 * (96 / count) ** 0.5  # Gaussian: its fourth moment
        # An expert that nobody trained is noised like all others.
        assert abs(values[-2000:].var() / sigma**2 - 1) < 5 * (2 / 2000) ** 0.5
    assert abs(np.corrcoef(*numbers)[0, 1]) < 5 / len(numbers[0]) ** 0.5


@pytest.mark.parametrize("bounds", [{"clip": 0.5}, {"clip": 0.5, "expert_clip": 0.1}])
def test_a_client_moves_the_sum_by_at_most_the_bound(bounds: dict[str, float]):
    old, options = weights(), Central(**NONE, **bounds)
    others = [update(client, KEYS[client : client + 3]) for client in range(3)]

    def total(*updates):
        mean = PrivateMean(old, options, expected=1)
        for one in updates:
            mean.add(one)
        found = mean.result(0.0, source(0, "unused"))
        tensors = [*found.shared.values(), *(found.experts[key]["w"] for key in KEYS)]
        return np.concatenate([value.ravel() for value in tensors]).astype(np.float64)

    whole, without = total(*others), total(*others[1:])
    assert np.linalg.norm(whole - without) <= bounds["clip"] * (1 + 1e-5)
    if "expert_clip" in bounds:
        changes, shortened = clip(change(others[0], old), options)
        assert shortened
        assert all(np.linalg.norm(tensors["w"]) <= 0.1 + 1e-9 for key, tensors in changes.items() if key is not None)


def test_where_nothing_binds_it_is_the_mean_with_absent_experts_as_they_were():
    old, everyone = weights(), [update(client, KEYS[client : client + 4]) for client in range(4)]
    mean = PrivateMean(old, Central(**NONE, clip=1e9), expected=4)
    for one in everyone:
        mean.add(one)
    found = mean.result(0.0, source(0, "unused"))
    assert mean.clipped == 0
    for key in KEYS:
        sent = [one.experts.get(key, old.experts[key])["w"] for one in everyone]
        np.testing.assert_allclose(
            found.experts[key]["w"], np.mean(sent, axis=0, dtype=np.float64), rtol=1e-5, atol=1e-6
        )


def test_each_client_is_asked_with_the_same_chance_whoever_else_is(sources: Path, tmp_path: Path):
    clients = experiment(sources).clients.model_dump() | {"per_round": 1}
    central = CentralPrivacy(tiny(sources, LOOSE | {"noise_multiplier": 1.0}, clients=clients), tmp_path, rounds=None)
    drawn = np.zeros((2000, 4), dtype=bool)
    for round in range(2000):
        drawn[round, list(central.cohort(round))] = True
    assert central.cohort(1999) == central.cohort(1999)
    assert (abs(drawn.mean(axis=0) - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5).all()
    sizes = np.bincount(drawn.sum(axis=1), minlength=5) / 2000
    assert sizes == pytest.approx([0.316, 0.422, 0.211, 0.047, 0.004], abs=0.06)  # binomial: nobody in every third


# ---------------------------------------------------------------------------------------------------------------- runs


def test_without_noise_and_bounds_a_run_is_the_same_to_the_last_bit(sources: Path, tmp_path: Path):
    """Also with half of the clients a round, where a private cohort would be drawn otherwise."""
    clients = experiment(sources).clients.model_dump() | {"per_round": 2}
    summaries = [
        run(tiny(sources, central, clients=clients), tmp_path / name)[1]
        for name, central in (("plain", None), ("nothing", NONE))
    ]
    assert summaries[0]["model_sha256"] == summaries[1]["model_sha256"]
    assert not (tmp_path / "nothing" / "checkpoints" / "privacy.jsonl").exists()


def test_a_private_run_tells_what_it_spends_and_nothing_of_its_clients(sources: Path, tmp_path: Path):
    clients = experiment(sources).clients.model_dump() | {"per_round": 2}
    made = tiny(sources, LOOSE | {"noise_multiplier": 0.8}, clients=clients, rounds=3)
    context, summary, recorder = run(made, tmp_path / "run")
    expected = [accounting.epsilon(made.privacy.central, [(0.5, 0.8)] * n) for n in (1, 2, 3)]
    assert [report.privacy["epsilon"] for report in recorder.rounds[1:]] == expected
    assert summary["privacy"]["epsilon"] == expected[-1] == accounting.planned(made)["epsilon"]
    assert summary["privacy"]["void"]  # it has a seed
    assert not any("client" in fields or "cohort" in fields for _, fields in recorder.events)
    assert recorder.facts["partition"] == []
    for report in recorder.rounds:
        assert (report.loss, report.clients, report.agreement, report.own_accuracy) == (None, (), None, None)
        assert not np.any(report.usage)
        assert not np.any(report.selected)
    assert final_weights(context).version > 0


def test_a_resumed_run_remembers_each_model_that_was_noised(sources: Path, tmp_path: Path):
    made = tiny(sources, LOOSE | {"noise_multiplier": 0.8})
    _, _, whole = run(made, tmp_path / "whole")
    context, _, _ = run(made, tmp_path / "cut", stop_after=1)
    ledger = context.run_dir / "checkpoints" / "privacy.jsonl"
    spent = ledger.read_text()
    # As if the server had died after it had published the second round, before its checkpoint.
    ledger.write_text(spent + spent.replace('"round": 1', '"round": 2'))
    _, summary, rest = run(made, tmp_path / "cut", resume=True)
    assert summary["privacy"]["releases"] == 3
    assert summary["privacy"]["epsilon"] == accounting.epsilon(made.privacy.central, [(1.0, 0.8)] * 3)
    assert rest.rounds[-1].privacy["epsilon"] > whole.rounds[-1].privacy["epsilon"]
    ledger.unlink()
    with pytest.raises(CheckpointError, match=r"how much privacy the run has spent, tells nothing of round 1"):
        run(made.model_copy(update={"rounds": 3}), tmp_path / "cut", resume=True)


def test_a_run_stops_before_it_spends_more_than_its_budget(sources: Path, tmp_path: Path):
    made = tiny(sources, {"epsilon": 5.0, "delta": 0.01, "clip": 0.1, "repeats": 0}, rounds=1)
    context, summary, _ = run(made, tmp_path / "run")
    assert summary["privacy"]["epsilon"] <= 5.0
    assert not summary["privacy"]["void"]
    before = final_weights(context)
    central = CentralPrivacy(made, tmp_path / "run" / "checkpoints", rounds=1)
    with pytest.raises(TrainingError, match="would spend more"):
        central.release(central.mean(before), 2)
    assert central.spent()["releases"] == 1


def test_a_run_with_secret_noise_is_not_verified_and_one_with_a_seed_is(sources: Path, tmp_path: Path):
    secret = {"unprotected": True, "delta": 0.01, "clip": 0.1, "noise_multiplier": 0.8}
    for name, central in (("secret", secret), ("seeded", secret | {"noise_seed": 1})):
        made = tiny(sources, central)
        context, _, _ = run(made, tmp_path / name)
        (context.run_dir / "config.yaml").write_text(dump_experiment(made))
    with pytest.raises(ConfigError, match="in secret"):
        verify_run(tmp_path / "secret", rounds=1, backend="local", render=print)
    assert [one.different for one in verify_run(tmp_path / "seeded", rounds=1, backend="local", render=print)] == [()]
