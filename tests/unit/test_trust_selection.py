"""The private choice of experts: within its epsilon for any two clients, and what a run makes of it."""

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tiny_federation import experiment, run

from hfedmoe_ray.config.privacy import Selection
from hfedmoe_ray.trust.noise import SecretSource
from hfedmoe_ray.trust.selection import answer, noisy_top, noisy_usage, nothing, random_response
from hfedmoe_ray.types import ExpertKey, RoutingProfile

SHAPE = (2, 3)
DRAWS = 20_000
STRATEGY = {"name": "hfedmoe", "tau": 0.5, "unselected": "reroute", "explore": 0.0}


def best_of(*members: int) -> Any:
    best = np.zeros(6, dtype=bool)
    best[list(members)] = True
    return best.reshape(SHAPE)


def frequencies(best: Any, epsilon: float, rng: np.random.Generator) -> dict[tuple[int, ...], float]:
    """How often each set was answered."""
    counts = dict.fromkeys(combinations(range(6), int(best.sum())), 0)
    for _ in range(DRAWS):
        counts[tuple(np.flatnonzero(random_response(best, epsilon, rng)))] += 1
    return {chosen: count / DRAWS for chosen, count in counts.items()}


@pytest.mark.parametrize("size", [2, 4])
def test_sets_are_answered_as_often_as_the_formula_says(size: int):
    """Also where any two sets overlap, with 4 of 6; two clients then differ by at most e^epsilon in every answer."""
    epsilon, rng = 1.5, np.random.default_rng(0)
    best = best_of(*range(size))
    least = max(0, 2 * size - 6)
    powers = {
        chosen: np.exp(epsilon * sum(one < size for one in chosen) / (size - least))
        for chosen in combinations(range(6), size)
    }
    found = frequencies(best, epsilon, rng)
    for chosen, power in powers.items():
        expected = power / sum(powers.values())
        assert abs(found[chosen] - expected) < 5 * (expected / DRAWS) ** 0.5
    assert max(powers.values()) / min(powers.values()) == pytest.approx(np.exp(epsilon))


def test_noise_follows_from_epsilon_at_both_ends():
    score = np.array([[0.5, 0.1, 0.0], [0.0, 0.3, 0.1]])
    true = [(0, 0), (1, 1)]
    for draws in (np.random.default_rng(0), SecretSource()):
        assert [*zip(*np.nonzero(noisy_top(score, 2, 1e9, 1.0, draws)), strict=True)] == true
        np.testing.assert_allclose(noisy_usage(score, 1e9, draws), score, atol=1e-6)
        assert (random_response(score > 0.2, 1e4, draws) == (score > 0.2)).all()
    many = np.array([noisy_top(score, 2, 1e-6, 1.0, draws) for _ in range(4000)]).mean(axis=0)
    np.testing.assert_allclose(many, 1 / 3, atol=0.05)  # no difference is left
    noise = np.array([noisy_usage(score, 2.0, draws) - score for _ in range(4000)]).ravel()
    assert np.abs(noise).mean() == pytest.approx(2 * 2 / 2.0, rel=0.05)  # Laplace: its scale, 2 L / epsilon
    assert noise.std() == pytest.approx(2**0.5 * 2, rel=0.05)


def test_an_answer_says_no_more_than_its_set():
    rng = np.random.default_rng(1)
    usage = rng.dirichlet(np.ones(3), size=2)
    profile = RoutingProfile(usage=usage, specific=usage * 2, kl=usage / 3, routed=usage * 100, tokens=321)
    told = answer(Selection(epsilon=2.0), profile, usage, 3, "global", client=0)
    assert sorted(np.unique(told.usage)) == [0.0, 1.0]
    assert told.usage.sum() == 3
    assert (told.specific == told.usage).all()
    assert (told.tokens, told.kl.sum(), told.routed.sum()) == (1, 0.0, 0.0)


def test_a_run_plans_by_the_one_answer_and_learns_no_other(sources: Path, tmp_path: Path):
    private = {"selection": {"epsilon": 1e4, "noise_seed": 0}}
    held: dict[str, list[Any]] = {}
    for name, privacy in (("open", {}), ("sure", private), ("secret", {"selection": {"epsilon": 0.1}})):
        made = experiment(sources, strategy=STRATEGY, privacy=privacy, rounds=2)
        context, summary, recorder = run(made, tmp_path / name)
        assert summary["status"] == "finished"
        held[name] = [report.selected for report in recorder.rounds[1:]]
        if name != "open":
            rows = context.model.shape.experts
            np.testing.assert_allclose([report.usage for report in recorder.rounds[1:]], 1 / rows)
    # An answer that is as good as certain gives the plans of the open run in its first round.
    assert held["sure"][0] == held["open"][0]
    assert nothing(SHAPE).usage[ExpertKey(0, 0)] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "fedavg"}, "which experts a client chooses"),
        ({"strategy": {"name": "hfedmoe"}}, "mean outputs"),
        ({"strategy": STRATEGY | {"coverage": 0.3}}, "profiles of others"),
    ],
)
def test_what_would_tell_it_all_the_same_is_refused(sources: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        experiment(sources, privacy={"selection": {"epsilon": 1.0}}, **changes)
