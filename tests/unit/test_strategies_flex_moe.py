"""FLEX-MoE: what it learns of experts, whom it gives them to, how evenly, and routers that nobody else ever sees."""

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from tiny_federation import experiment, final_weights, run

from hfedmoe_ray.config import strategies as configs
from hfedmoe_ray.federation import averaging
from hfedmoe_ray.federation.checkpoint import load_checkpoint, run_identity
from hfedmoe_ray.moe.prepare import router_layers
from hfedmoe_ray.strategies import build_strategy
from hfedmoe_ray.strategies.flex_moe import FlexMoE
from hfedmoe_ray.strategies.scores import mask
from hfedmoe_ray.types import ClientInfo, ClientUpdate, ExpertKey, ModelShape, RoutingProfile

SHAPE = ModelShape(layers=3, experts=16, top_k=2, hidden=4, expert_bytes=1, shared_bytes=1, frozen_bytes=1)
GRID = (3, 16)
NO_EVALUATION = {"own": "never", "every": 2}
FLEX = {"name": "flex_moe", "fitness": "loss"}


def clients(count):
    """Three device classes: 12.5, 25 and 50 % of 48 experts."""
    budgets = (6, 12, 24)
    return [
        ClientInfo(client=c, tier="t", resident_experts=budgets[c % 3], batch_experts=budgets[c % 3], samples=10)
        for c in range(count)
    ]


def profile(seed=0, routed=None):
    usage = np.random.default_rng(seed).dirichlet(np.ones(16), size=3)
    routed = np.ones(GRID) if routed is None else routed
    return RoutingProfile(usage=usage, specific=usage, kl=usage * 0, routed=routed, tokens=100)


def update(client, plan, routed=None, **signals):
    made = profile(client, routed)
    return ClientUpdate(
        client=client,
        samples=10,
        experts={},
        shared={},
        trained=dict.fromkeys(plan.trainable, 1),
        profile=made,
        means={},
        signals=signals,
    )


def flex(**options):
    return build_strategy(configs.FlexMoE(**options), SHAPE, 0)


def test_fitness_moves_for_assigned_pairs_alone_and_starts_above_everything():
    strategy, cohort = flex(smoothing=0.3), clients(4)
    plans = strategy.plan(1, cohort, {})
    accuracy = np.random.default_rng(1).random(GRID)
    unused = ExpertKey(*plans[2].trainable[0])
    routed = np.ones(GRID)
    routed[unused] = 0
    strategy.observe(1, {2: update(2, plans[2], routed, accuracy=accuracy)}, plans)
    held = mask(GRID, plans[2].trainable)
    measured = accuracy.copy()
    measured[unused] = 0  # no token: of no use to this client
    np.testing.assert_array_equal(strategy.fitness(2), np.where(held, 0.7 * 1.0 + 0.3 * measured, 1.0))
    assert (strategy.fitness(1) == 1).all()
    assert (strategy.fitness(3) == 1).all(), "never heard of"
    # Its update did not arrive: nobody else's experts count as held.
    np.testing.assert_array_equal(strategy.state["holders"], held)
    before = strategy.fitness(2).copy()
    plans = strategy.plan(2, cohort[2:], {})
    strategy.observe(2, {3: update(3, plans[3], accuracy=accuracy)}, plans)
    np.testing.assert_array_equal(strategy.fitness(2), before)
    assert (strategy.fitness(3) < 1).sum() == len(plans[3].trainable)


def test_either_fitness_is_measured_as_it_says():
    assert flex().signals == {"accuracy"}
    strategy = flex(fitness="loss", loss_scale=2.0, smoothing=1.0)
    assert strategy.signals == {"loss"}
    plans = strategy.plan(1, clients(1), {})
    loss = np.random.default_rng(1).random(GRID)
    strategy.observe(1, {0: update(0, plans[0], loss=loss)}, plans)
    held = mask(GRID, plans[0].trainable)
    np.testing.assert_array_equal(strategy.fitness(0)[held], np.exp(-2 * loss)[held])


def test_the_plan_gives_the_fittest_within_budgets_and_does_not_depend_on_the_order_of_clients():
    strategy, cohort = flex(tolerance=None, unselected="drop"), clients(6)
    rng = np.random.default_rng(0)
    strategy.state["fitness"] = rng.random((6, *GRID))
    plans = strategy.plan(1, cohort, {})
    assert strategy.plan(1, cohort[::-1], {}) == plans
    for client in cohort:
        fitness, held = strategy.fitness(client.client), mask(GRID, plans[client.client].trainable)
        assert held.sum() == client.resident_experts
        assert held.any(axis=1).all()
        assert (held & (fitness == fitness.max(axis=1, keepdims=True))).any(axis=1).all()
        assert plans[client.client].absent == "drop"
    assert strategy.plan(1, [], {}) == {}
    balanced = flex()
    balanced.state["fitness"] = strategy.state["fitness"]
    loads = sum(mask(GRID, plan.trainable).astype(int) for plan in balanced.plan(1, cohort, {}).values())
    mean = (6 + 12 + 24) * 2 / 48
    assert np.floor(0.9 * mean) <= loads.min() <= loads.max() <= np.ceil(1.1 * mean)
    assert np.ptp(sum(mask(GRID, plan.trainable).astype(int) for plan in plans.values())) > np.ptp(loads)


def test_a_client_uses_what_it_was_last_assigned_and_before_that_what_it_is_routed_to():
    strategy, cohort = flex(), clients(3)
    profiles = {c.client: profile(c.client) for c in cohort}
    plans = strategy.plan(1, cohort, profiles)
    strategy.observe(1, {1: update(1, plans[1], accuracy=np.zeros(GRID))}, plans)
    deployed = strategy.deploy(1, cohort, profiles)
    assert deployed[1].trainable == plans[1].trainable
    for client in (0, 2):
        held = mask(GRID, deployed[client].trainable)
        assert held.sum() == cohort[client].resident_experts
        usage = profiles[client].usage
        assert (held & (usage == usage.max(axis=1, keepdims=True))).any(axis=1).all()


def test_within_a_batch_the_experts_it_uses_most_are_trained():
    strategy = flex()
    plan = strategy.plan(1, clients(1), {})[0]
    routed = np.arange(48.0).reshape(GRID)
    tight = type(plan)(roles=plan.roles, batch_budget=4)
    assert strategy.selective(tight)
    chosen = strategy.select(profile(routed=routed), tight, np.random.default_rng(0))
    assert len(chosen) == 4
    assert chosen < set(plan.trainable)
    assert max(plan.trainable, key=lambda key: routed[key]) in chosen


def test_bounds_that_cannot_be_kept_are_reported():
    told = []
    strategy = flex()
    strategy.report = lambda name, fields: told.append((name, fields))
    strategy.plan(1, clients(6), {})
    assert told == []
    # Far behind: more holders are due than there are clients' places.
    holders = np.zeros(GRID, dtype=np.int64)
    holders[:, 8:] = 100
    strategy.state["holders"] = holders
    strategy.plan(2, clients(6), {})
    ((name, fields),) = told
    assert name == "bounds_relaxed"
    assert fields["round"] == 2
    assert fields["missing"] > 0


def served(seed):
    """Synthetic accuracy of 20 clients' examples on each of 3 x 16 experts, [20, 3, 16].

    Of four classes a client has one to 85 % and the others to 5 % each. An expert is at home in one class, 4 experts
    of a layer in each; it has a talent between 0 and 0.3 that helps every client, and serves a client with accuracy
    0.3 + its talent + 0.3 * (the share of its class in the client's data) + noise of 0.02 that stays.
    """
    rng = np.random.default_rng(seed)
    share = np.full((20, 4), 0.05)
    share[np.arange(20), np.arange(20) % 4] = 0.85
    home = np.arange(16) % 4
    talent = rng.uniform(0, 0.3, GRID)
    return np.clip(0.3 + talent + 0.3 * share[:, home][:, None, :] + 0.02 * rng.normal(size=(20, *GRID)), 0, 1)


def cumulative_load(seed, **options):
    """How many clients have held each expert after 40 rounds of 10 of 20 clients; only accuracies are made up."""
    strategy, everyone, accuracy = flex(**options), clients(20), served(seed)
    rng = np.random.default_rng(seed)
    for round in range(1, 41):
        cohort = [everyone[c] for c in sorted(rng.choice(20, 10, replace=False))]
        plans = strategy.plan(round, cohort, {})
        strategy.observe(round, {c: update(c, plan, accuracy=accuracy[c]) for c, plan in plans.items()}, plans)
    return strategy.state["holders"]


def test_cumulative_load_varies_at_most_a_tenth_of_what_it_does_without_bounds():
    for seed in range(2):
        balanced, greedy = cumulative_load(seed), cumulative_load(seed, tolerance=None)
        variation = [load.std() / load.mean() for load in (balanced, greedy)]
        assert variation[0] <= variation[1] / 10


def test_it_learns_the_same_whether_or_not_the_server_was_killed(sources: Path, tmp_path: Path):
    made = experiment(sources, strategy=FLEX, evaluate=NO_EVALUATION)
    straight, summary, _ = run(made, tmp_path / "straight")
    run(made, tmp_path / "broken", stop_after=1)
    resumed, again, _ = run(made, tmp_path / "broken", resume=True)
    assert again["model_sha256"] == summary["model_sha256"]
    first, second = (
        load_checkpoint(context.run_dir / "checkpoints", run_identity(context)).strategy
        for context in (straight, resumed)
    )
    assert {name: value.shape for name, value in first.items()} == {
        "fitness": (4, 2, 6),
        "assigned": (4, 2, 6),
        "holders": (2, 6),
    }
    for name, value in first.items():
        assert second[name].dtype == value.dtype
        np.testing.assert_array_equal(second[name], value)
    assert (first["fitness"] < 1).any()
    # 2 rounds of 2 (3 + 6) places for 12 experts: 3 each, within the tolerance of one round and rounding.
    assert first["holders"].mean() == 3
    assert 2 <= first["holders"].min() <= first["holders"].max() <= 4


def test_routers_are_as_their_clients_sent_them_and_nobody_else_gets_them(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    sent: dict[int, dict[str, bytes]] = {}
    add = averaging.Reducer.add

    def watched(reducer, update, plan):
        sent[update.client] = {name: value.tobytes() for name, value in update.shared.items()}
        return add(reducer, update, plan)

    monkeypatch.setattr(averaging.Reducer, "add", watched)
    some = experiment(sources).clients.model_copy(update={"per_round": 2})
    made = experiment(sources, strategy=FLEX, clients=some.model_dump(), rounds=3)
    context, _, _ = run(made, tmp_path / "run")
    personal, routers = final_weights(context).personal, set(router_layers(context.model))
    assert sorted(personal) == sorted(sent)
    assert len(sent) > 2, "some were last seen before the last round"
    for client, own in personal.items():
        assert {name: value.tobytes() for name, value in own.shared.items()} == {
            name: data for name, data in sent[client].items() if name in routers
        }
    assert len({tuple(value.tobytes() for value in own.shared.values()) for own in personal.values()}) == len(personal)


def test_a_run_tells_of_bounds_it_could_not_keep(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(FlexMoE, "_bounds", lambda strategy, _: (np.full(strategy.shape, 4.0), None))
    _, _, recorder = run(experiment(sources, strategy=FLEX, rounds=1, evaluate=NO_EVALUATION), tmp_path / "run")
    # All four clients were to hold all 12 experts, and have 2 (3 + 6) places.
    (told,) = [fields for name, fields in recorder.events if name == "bounds_relaxed"]
    assert (told["round"], told["missing"], told["surplus"]) == (1, 48 - 18, 0)


def test_where_every_client_holds_everything_there_is_nothing_to_assign():
    with pytest.raises(ValidationError, match=r"nothing to assign\. Leave it out; to keep the other experts"):
        configs.FlexMoE(resident="all")
