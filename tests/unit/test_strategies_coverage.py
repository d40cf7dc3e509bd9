"""HFedMoE with coverage: off it is the rule it was, on it reaches more experts, evenly at most, at the least cost."""

from pathlib import Path

import numpy as np
import pytest
from tiny_federation import experiment, run

from hfedmoe_ray.config import strategies as configs
from hfedmoe_ray.federation.checkpoint import load_checkpoint, run_identity
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.strategies import build_strategy
from hfedmoe_ray.strategies.coverage import kept_share, phases
from hfedmoe_ray.strategies.rules import expert_weights
from hfedmoe_ray.strategies.scores import explore, mask, resident_plan, top_experts
from hfedmoe_ray.types import ClientInfo, ClientUpdate, ExpertKey, ModelShape, RoutingProfile

SHAPE = ModelShape(layers=3, experts=16, top_k=2, hidden=4, expert_bytes=1, shared_bytes=1, frozen_bytes=1)
GRID = (3, 16)
NO_EVALUATION = {"own": "never", "every": 2}
KNOB = (0.0, 0.25, 0.5, 0.75, 1.0)


def hfedmoe(**options):
    return build_strategy(configs.HFedMoE(**options), SHAPE, 0)


def clients(count, budget=6):
    """Of 12.5 % of 48 experts each, unless told otherwise."""
    return [
        ClientInfo(client=c, tier="t", resident_experts=budget, batch_experts=budget, samples=10) for c in range(count)
    ]


def profiles(count, seed=0):
    """Made-up routing: usage falls off steeply over experts, in nearly the same order on every client."""
    rng = np.random.default_rng(seed)
    liking = np.exp(-np.arange(16) / 3)
    found = {}
    for client in range(count):
        usage = liking * rng.uniform(0.5, 1.5, GRID)
        usage /= usage.sum(axis=1, keepdims=True)
        specific = np.sqrt(usage)
        found[client] = RoutingProfile(usage=usage, specific=specific, kl=usage * 0.1, routed=np.ones(GRID), tokens=100)
    return found


def loads(plans):
    return sum(mask(GRID, plan.trainable).astype(int) for plan in plans.values())


def rounds_of(strategy, cohort, known, count):
    """Plans of some rounds in which every update arrives."""
    for round in range(1, count + 1):
        plans = strategy.plan(round, cohort, known)
        strategy.observe(round, dict.fromkeys(plans), plans)
        yield plans


@pytest.mark.parametrize("scope", ["global", "per_layer"])
@pytest.mark.parametrize("explored", [0.0, 0.3])
def test_without_coverage_every_client_chooses_as_before_and_nothing_is_remembered(scope, explored):
    strategy, known = hfedmoe(scope=scope, explore=explored), profiles(5)
    everything = np.ones(GRID, dtype=bool)
    for round, plans in enumerate(rounds_of(strategy, clients(5), known, 3), start=1):
        for client, plan in plans.items():
            score = known[client].ib_score(0.5, 0.1)
            chosen = top_experts(score, everything, 6, scope)
            chosen = explore(chosen, score, explored, generator(0, "explore", round, client))
            assert plan == resident_plan(GRID, chosen, "mean", 6)
    assert strategy.state == {}


@pytest.mark.parametrize("scope", ["global", "per_layer"])
def test_as_long_as_nothing_is_due_coverage_changes_nothing(scope):
    known, cohort = profiles(5), clients(5)
    # T = 5 * 6 / 48: what 0.001 of it adds to the largest phase stays below 1.
    plans = hfedmoe(scope=scope, explore=0.0, coverage=0.001).plan(1, cohort, known)
    assert plans == hfedmoe(scope=scope, explore=0.0).plan(1, cohort, known)


@pytest.mark.parametrize("count", [4, 10, 20], ids=lambda n: f"{n * 6 / 48} holders an expert")
def test_the_knob_reaches_more_experts_step_by_step(count):
    known, cohort = profiles(count), clients(count)
    first = [(loads(hfedmoe(coverage=c, explore=0.0).plan(1, cohort, known)) > 0).sum() for c in KNOB]
    assert first == sorted(first)
    assert first[-1] == min(48, count * 6), "as many as there are places, or all"
    assert first[-1] > 1.5 * first[0]
    total, relaxed = {}, []
    for c in KNOB:
        strategy = hfedmoe(coverage=c)
        strategy.report = lambda *event: relaxed.append(event)
        total[c] = sum(loads(plans) for plans in rounds_of(strategy, cohort, known, 8))
        assert total[c].min() >= np.floor(c * 8 * count * 6 / 48), "as many holders as were promised"
    assert relaxed == [], "budgets allow it, exploration included"
    assert total[0.0].min() < 0.1 * total[0.0].mean(), "by itself hardly anybody would hold some of them"
    assert np.ptp(total[1.0]) <= 1
    spread = [total[c].std() for c in KNOB]
    assert spread == sorted(spread, reverse=True)


def test_bounds_claim_the_asked_share_of_places_whatever_the_cohort():
    for layers, experts in ((3, 16), (2, 6), (1, 7)):
        spread = phases((layers, experts), seed=3)
        assert ((spread > 0) & (spread < 1)).all()
        for places in range(1, 60):
            mean = places / (layers * experts)
            assert np.floor(mean + spread).sum() == places
    assert (phases(GRID, 3) != phases(GRID, 4)).any()


def test_budgets_hold_exploration_stays_and_the_order_of_clients_does_not_matter():
    known = profiles(6)
    cohort = [
        ClientInfo(client=c, tier="t", resident_experts=b, batch_experts=b, samples=10)
        for c, b in enumerate((3, 6, 6, 12, 24, 48))
    ]
    strategy = hfedmoe(coverage=0.5, explore=0.3)
    plans = strategy.plan(1, cohort, known)
    assert strategy.plan(1, cohort[::-1], known) == plans
    assert strategy.state == {}, "planning remembers nothing"
    everything = np.ones(GRID, dtype=bool)
    for client in cohort:
        held = set(plans[client.client].trainable)
        assert len(held) == client.resident_experts
        assert {key.layer for key in held} == {0, 1, 2}
        score = known[client.client].ib_score(0.5, 0.1)
        best = top_experts(score, everything, client.resident_experts, "global")
        drawn = explore(best, score, 0.3 * (1 - 0.5), generator(0, "explore", 1, client.client)) - best
        assert drawn <= held
        # What a client uses is its own best, whatever it is asked to train.
        assert set(strategy.deploy(1, cohort, known)[client.client].trainable) == best


def test_one_client_of_large_scores_does_not_leave_the_unpopular_experts_to_the_others():
    known, cohort = profiles(8), clients(8)
    loud = {**known, 0: RoutingProfile(**{**vars(known[0]), "specific": known[0].specific * 100})}
    same = {**known, 0: RoutingProfile(**{**vars(known[0]), "specific": known[0].specific * 1.0})}

    def kept(scores, plans):
        everything = np.ones(GRID, dtype=bool)
        share = {}
        for client, profile in scores.items():
            score = profile.ib_score(0.0, 0.0)  # lam 0: scores are proportional to `specific`
            best = top_experts(score, everything, 6, "global")
            share[client] = sum(score[k] for k in plans[client].trainable) / sum(score[k] for k in best)
        return share

    quiet, noisy = (hfedmoe(coverage=0.8, explore=0.0, lam=0.0, beta=0.0).plan(1, cohort, one) for one in (same, loud))
    assert noisy == quiet
    assert min(kept(known, quiet).values()) > 0.3
    score = known[1].specific
    scaled = kept_share(score, 6)
    ranked = np.sort(scaled, axis=None)
    assert ranked[-6:].sum() - ranked[:6].sum() == pytest.approx(1)
    np.testing.assert_array_equal(kept_share(score, 48), score)


def test_what_clients_failed_to_deliver_is_made_up_for():
    strategy, known, cohort = hfedmoe(coverage=1.0, explore=0.0), profiles(8), clients(8)
    plans = strategy.plan(1, cohort, known)
    strategy.observe(1, dict.fromkeys(range(4)), plans)
    missed = loads(plans) - strategy.state["holders"]
    assert strategy.state["holders"].sum() == 4 * 6
    again = loads(strategy.plan(2, cohort, known))
    # One holder an expert and round: after two rounds with 24 of 96 places lost, 72 for 48 experts.
    assert ((strategy.state["holders"] + again) >= 1).all()
    assert again[missed > 0].mean() > again[missed == 0].mean()


def test_what_was_held_survives_the_server(sources: Path, tmp_path: Path):
    made = experiment(sources, strategy={"name": "hfedmoe", "tau": 0.5, "coverage": 1.0}, evaluate=NO_EVALUATION)
    straight, summary, _ = run(made, tmp_path / "straight")
    run(made, tmp_path / "broken", stop_after=1)
    resumed, again, _ = run(made, tmp_path / "broken", resume=True)
    assert again["model_sha256"] == summary["model_sha256"]
    first, second = (
        load_checkpoint(context.run_dir / "checkpoints", run_identity(context)).strategy["holders"]
        for context in (straight, resumed)
    )
    np.testing.assert_array_equal(second, first)
    # 2 rounds of 2 (3 + 6) places for 12 experts.
    assert (first == 3).all()


def test_what_coverage_lets_clients_train_is_averaged_however_little_they_use_it():
    known, cohort = profiles(8), clients(8)

    def averaged(**options):
        strategy = hfedmoe(explore=0.0, **options)
        plans, taken = strategy.plan(1, cohort, known), np.zeros(GRID, dtype=bool)
        for client, plan in plans.items():
            sent = ClientUpdate(
                client=client,
                samples=10,
                experts={},
                shared={},
                trained=dict.fromkeys(plan.trainable, 1),
                profile=known[client],
                means={},
            )
            taken |= expert_weights(strategy.expert_rule, sent, plan) > 0
        return taken.sum()

    assert averaged(coverage=1.0) == 48
    assert averaged(coverage=1.0, tau=1.0) < 0.6 * 48, "the threshold of the paper"
    assert averaged() == averaged(tau=1.0), "which stands without coverage"


@pytest.mark.parametrize("share", KNOB)
@pytest.mark.parametrize("scope", ["global", "per_layer"])
def test_in_a_batch_coverage_gives_that_share_of_the_budget_to_what_else_was_routed_to(share, scope):
    # In the paper's setting every client holds every expert, and all that is chosen is what a batch trains.
    strategy = hfedmoe(resident="all", coverage=share, scope=scope)
    batch = profiles(1)[0]
    batch.routed[:, 12:] = 0
    plan = strategy.plan(1, clients(1), {0: batch})[0]
    best = top_experts(strategy.score(batch), batch.routed > 0, 6, scope)
    rng = np.random.default_rng(0)
    chosen = [strategy.select(batch, plan, rng) for _ in range(400)]
    assert all(len(one) == 6 and all(key.expert < 12 for key in one) for one in chosen)
    # What is drawn may be one of the best again, where fewer of them were taken.
    others = np.mean([len(one - best) for one in chosen])
    assert others == pytest.approx(6 * share * (36 - 6) / (36 - 6 + 6 * share), abs=0.2)
    assert len(frozenset[ExpertKey]().union(*chosen)) == (36 if share else 6)


def test_what_coverage_leaves_to_few_clients_is_held_back_unless_told_otherwise():
    assert hfedmoe().rules.anchor == 0, "the paper's mean"
    assert hfedmoe(coverage=0.1).rules.anchor == 1
    assert hfedmoe(coverage=0.1, anchor=0.3).rules.anchor == hfedmoe(anchor=0.3).rules.anchor == 0.3
