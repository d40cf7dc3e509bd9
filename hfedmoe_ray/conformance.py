"""What every strategy must hold, built-in or not, as checks that need no model: each takes milliseconds.

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_strategy(check):
        check({"name": "my_package.my_module:MyStrategy"})

A check takes the section `strategy` of a configuration and raises AssertionError. Clients are made up: five of them,
with budgets from 2 to 12 of 12 experts, whose tensors, profiles and signals are random but a pure function of
(client, round). What the server does between them is the real thing: plans, rules, reducer, checkpoints.

Not every option keeps every promise: the router weights that HFedMoE's paper prints, for one, do not give back what
was sent. Check what a strategy promises by default.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from hfedmoe_ray.config.strategies import Placement, StrategyConfig
from hfedmoe_ray.federation.checkpoint import load_checkpoint, save_checkpoint
from hfedmoe_ray.federation.reporting import mean_profile
from hfedmoe_ray.federation.state import FederationState
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.strategies import AnyStrategy, build_strategy
from hfedmoe_ray.strategies.aggregation import MeanOutputs, Reducer
from hfedmoe_ray.types import (
    Array,
    ClientInfo,
    ClientUpdate,
    ExpertKey,
    ExpertPlan,
    ModelShape,
    RoutingProfile,
    Weights,
)

SHAPE = ModelShape(layers=2, experts=6, top_k=2, hidden=4, expert_bytes=80, shared_bytes=1, frozen_bytes=1)
ROUTERS = {f"router.{layer}": layer for layer in range(SHAPE.layers)}
CLIENTS = tuple(
    ClientInfo(client=client, tier="made-up", resident_experts=held, batch_experts=batch, samples=10 * (client + 1))
    for client, (held, batch) in enumerate([(2, 2), (3, 2), (6, 6), (6, 3), (12, 12)])
)
STEPS = 3
"""Of each client in each round."""
Options = str | Mapping[str, Any]
"""The section `strategy` of a configuration."""


def a_plan_is_a_function_of_seed_round_client_and_state(options: Options) -> None:
    """Asking twice, in another order, or another process that has the same state, gives the same plans."""
    strategy, state = _made(options), _started()
    for round in (1, 2):
        _train(strategy, state, round)
    before = {name: value.copy() for name, value in strategy.state.items()}
    other = _made(options)
    for one in (strategy, other):
        one.study(state.weights)
    plans = strategy.plan(3, CLIENTS, state.profiles)
    other.state = {name: value.copy() for name, value in before.items()}
    assert sorted(plans) == [client.client for client in CLIENTS], "every client of the cohort has a plan"
    for plan in plans.values():
        assert np.shape(plan.roles) == strategy.shape
    for what, again in {
        "asking twice": strategy.plan(3, CLIENTS, state.profiles),
        "the order of clients": strategy.plan(3, CLIENTS[::-1], state.profiles),
        "another process": other.plan(3, CLIENTS, state.profiles),
    }.items():
        assert again == plans, f"{what} changes a plan"
    assert strategy.deploy(3, CLIENTS, state.profiles) == other.deploy(3, CLIENTS[::-1], state.profiles)
    _assert_same(before, strategy.state, "planning changes the state; `observe` is where to learn")


def the_budget_is_kept(options: Options) -> None:
    """A strategy with a budget trains at most that; one of any kind selects only what may train, within its plan."""
    strategy, state = _made(options), _started()
    config = strategy.config
    limited = isinstance(config, Placement) and config.resident == "budget"
    for round in (1, 2, 3):
        for client, plan in strategy.plan(round, CLIENTS, state.profiles).items():
            info = CLIENTS[client]
            if limited:
                assert len(plan.trainable) <= info.resident_experts, f"client {client} trains more than it can hold"
                assert len({key.layer for key in plan.trainable}) == SHAPE.layers, "a layer has nothing to train"
            for step in range(STEPS):
                chosen = strategy.select(_profile(client, round, step), plan, generator(0, "select", round, client))
                assert chosen <= set(plan.trainable), f"client {client} selects what it may not train"
                allowed = len(plan.trainable) if plan.batch_budget is None else plan.batch_budget
                assert len(chosen) <= allowed, f"client {client} selects {len(chosen)} experts in a batch"
        if isinstance(config, Placement):
            for client, plan in strategy.deploy(round, CLIENTS, state.profiles).items():
                assert len(plan.present) <= CLIENTS[client].resident_experts, f"client {client} cannot use its model"
        _train(strategy, state, round)


def equal_contributions_come_back(options: Options) -> None:
    """Conservation: where all clients send the same, the mean is what they sent, to the bit.

    Where an anchor holds an expert back, because few take part in it, it goes that share of the way there.
    """
    strategy, state = _made(options), _started()
    plans = strategy.plan(1, CLIENTS, state.profiles)
    sent = _weights("sent")
    updates = [
        replace(update, experts={key: sent.experts[key] for key in update.experts}, shared=sent.shared)
        for update in _updates(strategy, state, 1, plans)
    ]
    reducer = _reducer(strategy, state.weights)
    for update in updates:
        reducer.add(update, plans[update.client])
    new = reducer.result()
    contributed = {key for update in updates for key in update.experts} & reducer.participants
    assert contributed, "nobody takes part in any expert"
    for key in contributed:
        taking_part = sum(strategy.rules.experts(one, plans[one.client], key) > 0 for one in updates)
        missing = strategy.rules.anchor * len(updates) - taking_part
        if missing <= 0:
            _assert_same(sent.experts[key], new.experts[key], f"expert {tuple(key)}")
            continue
        for name, value in new.experts[key].items():
            old = state.weights.experts[key][name]
            part = taking_part / (taking_part + missing) * (sent.experts[key][name] - old)
            np.testing.assert_allclose(value, old + part, rtol=1e-5, atol=1e-5, err_msg=f"expert {tuple(key)}: {name}")
    for name, value in sent.shared.items():
        came_back = (new.shared[name] == value).all(axis=1)
        kept = (new.shared[name] == state.weights.shared[name]).all(axis=1)
        # Rows of a router may be nobody's; they keep their old bits.
        assert (came_back | (kept & (name in ROUTERS))).all(), f"{name} is not what everybody sent"


def no_order_of_clients_matters(options: Options) -> None:
    """The mean is that of a set of updates, within the rounding of a sum."""
    strategy, state = _made(options), _started()
    plans = strategy.plan(1, CLIENTS, state.profiles)
    updates = _updates(strategy, state, 1, plans)
    results = []
    for order in (updates, updates[::-1], updates[2:] + updates[:2]):
        reducer = _reducer(strategy, state.weights)
        for update in order:
            reducer.add(update, plans[update.client])
        results.append(reducer.result())
    for other in results[1:]:
        for name, value in results[0].shared.items():
            np.testing.assert_allclose(other.shared[name], value, rtol=1e-5, atol=1e-7, err_msg=name)
        for key, tensors in results[0].experts.items():
            for name, value in tensors.items():
                np.testing.assert_allclose(other.experts[key][name], value, rtol=1e-5, atol=1e-7)


def what_nobody_trained_keeps_its_bits(options: Options) -> None:
    """Experts that no client took a step on are what they were, whatever is averaged around them."""
    strategy, state = _made(options), _started()
    plans = strategy.plan(1, CLIENTS[:2], state.profiles)
    untouched = ExpertKey(0, 0)
    reducer = _reducer(strategy, state.weights)
    for update in _updates(strategy, state, 1, plans):
        kept = {key: value for key, value in update.experts.items() if key != untouched}
        trained = {key: steps for key, steps in update.trained.items() if key != untouched}
        reducer.add(replace(update, experts=kept, trained=trained), plans[update.client])
    new = reducer.result()
    moved = {key for key in new.experts if (new.experts[key]["up"] != state.weights.experts[key]["up"]).any()}
    possible = {key for plan in plans.values() for key in plan.trainable} - {untouched}
    assert moved <= possible, f"{sorted(moved - possible)} moved and were trained by nobody"


def a_killed_server_loses_nothing(options: Options) -> None:
    """Four rounds are those of two, a checkpoint, another process and two more: weights, plans and state."""
    straight, whole = _made(options), _started()
    for round in (1, 2, 3, 4):
        _train(straight, whole, round)
    before, state = _made(options), _started()
    for round in (1, 2):
        _train(before, state, round)
    state.strategy, state.round = before.state, 2
    with tempfile.TemporaryDirectory(prefix="hfedmoe-conformance-") as directory:
        save_checkpoint(Path(directory), state, "made-up", keep=1)
        state = load_checkpoint(Path(directory), "made-up")
    resumed = _made(options)
    resumed.state = state.strategy
    for round in (3, 4):
        _train(resumed, state, round)
    _assert_same(straight.state, resumed.state, "the state")
    _assert_same(whole.weights.shared, state.weights.shared, "shared parameters")
    for key, tensors in whole.weights.experts.items():
        _assert_same(tensors, state.weights.experts[key], f"expert {tuple(key)}")
    assert straight.plan(5, CLIENTS, whole.profiles) == resumed.plan(5, CLIENTS, state.profiles)


def its_options_survive_a_file(options: Options) -> None:
    """What is written into a run's config.yaml is read back as the same options."""
    config = _config(options)
    assert _config(_SECTION.dump_python(config, mode="json")) == config


CHECKS: tuple[Callable[[Options], None], ...] = (
    a_plan_is_a_function_of_seed_round_client_and_state,
    the_budget_is_kept,
    equal_contributions_come_back,
    no_order_of_clients_matters,
    what_nobody_trained_keeps_its_bits,
    a_killed_server_loses_nothing,
    its_options_survive_a_file,
)
"""All of them, to parametrise a test with."""

_SECTION: TypeAdapter[Any] = TypeAdapter(StrategyConfig)


# ---------------------------------------------------------------------------------------------------- made-up clients


def _config(options: Options) -> Any:
    return _SECTION.validate_python(options)


def _made(options: Options) -> AnyStrategy:
    strategy = build_strategy(_config(options), SHAPE, 0)
    strategy.study(_weights("old"))
    return strategy


def _started() -> FederationState:
    """A server before its first round, all clients profiled."""
    profiles = {client.client: _profile(client.client, 0, 0) for client in CLIENTS}
    return FederationState(weights=_weights("old"), round=0, profiles=profiles)


def _train(strategy: AnyStrategy, state: FederationState, round: int) -> None:
    """One round, as the server's."""
    strategy.study(state.weights)
    plans = strategy.plan(round, CLIENTS, state.profiles)
    reducer, means = _reducer(strategy, state.weights), MeanOutputs()
    updates = _updates(strategy, state, round, plans)
    for update in updates:
        reducer.add(update, plans[update.client])
        means.add(update)
    state.weights = replace(reducer.result(), means=means.result(state.weights.means))
    cohort = mean_profile([update.profile for update in updates if update.profile is not None])
    assert cohort is not None
    for update in updates:
        assert update.profile is not None
        state.profiles[update.client] = strategy.blend(update.profile, plans[update.client], cohort)
    strategy.observe(round, {u.client: replace(u, experts={}, shared={}, means={}) for u in updates}, plans)


def _reducer(strategy: AnyStrategy, old: Weights) -> Reducer:
    return Reducer(old=old, router_layers=ROUTERS, layers=SHAPE.layers, rules=strategy.rules)


def _updates(
    strategy: AnyStrategy, state: FederationState, round: int, plans: Mapping[int, ExpertPlan]
) -> list[ClientUpdate]:
    return [_update(strategy, state.weights, round, client, plan) for client, plan in sorted(plans.items())]


def _update(strategy: AnyStrategy, old: Weights, round: int, client: int, plan: ExpertPlan) -> ClientUpdate:
    """What a client sends that moves everything it may by random numbers."""
    rng = generator(0, "conformance", round, client)
    trained: Counter[ExpertKey] = Counter()
    for step in range(STEPS):
        trained.update(strategy.select(_profile(client, round, step), plan, rng))
    return ClientUpdate(
        client=client,
        samples=CLIENTS[client].samples,
        experts={key: _moved(old.experts[key], rng) for key in sorted(trained)},
        shared=_moved(old.shared, rng),
        trained=dict(trained),
        profile=_profile(client, round, 0),
        means={key: (rng.normal(size=SHAPE.hidden).astype(np.float32), 5) for key in plan.present},
        signals={signal: rng.random(strategy.shape) for signal in sorted(strategy.signals)},
    )


def _moved(tensors: Mapping[str, Array], rng: np.random.Generator) -> dict[str, Array]:
    return {name: tensors[name] + rng.normal(size=tensors[name].shape).astype(np.float32) for name in sorted(tensors)}


def _profile(client: int, round: int, step: int) -> RoutingProfile:
    rng = generator(0, "conformance-profile", client, round, step)
    usage = rng.dirichlet(np.ones(SHAPE.experts), size=SHAPE.layers)
    routed = rng.multinomial(100, usage).astype(np.float64)
    return RoutingProfile(usage=usage, specific=np.minimum(2 * usage, 1.0), kl=usage / 4, routed=routed, tokens=100)


def _weights(which: str) -> Weights:
    rng = generator(0, "conformance-weights", *which.encode())

    def drawn(*shape: int) -> Array:
        return rng.normal(size=shape).astype(np.float32)

    return Weights(
        version=0,
        shared={name: drawn(SHAPE.experts, SHAPE.hidden) for name in ROUTERS} | {"head": drawn(3, SHAPE.hidden)},
        experts={
            ExpertKey(layer, expert): {"up": drawn(5, SHAPE.hidden), "down": drawn(SHAPE.hidden, 5)}
            for layer in range(SHAPE.layers)
            for expert in range(SHAPE.experts)
        },
        means=drawn(SHAPE.layers, SHAPE.experts, SHAPE.hidden),
    )


def _assert_same(one: Mapping[str, Array], other: Mapping[str, Array], what: str) -> None:
    assert set(one) == set(other), what
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=f"{what}: {name}")
