"""Rules by name: what each weighs, what a configuration may ask for, a strategy's own preset changes nothing."""

import numpy as np
import pytest
from made_up_updates import EXPERTS, KEYS, LAYERS, PLAN, ROUTERS, update, weights
from pydantic import TypeAdapter
from tiny_federation import experiment, final_weights, run

from hfedmoe_ray.config import strategies as configs
from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.config.server import PRESETS, Rules
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.moe.prepare import initial_weights, router_layers
from hfedmoe_ray.strategies import build_strategy, built_in
from hfedmoe_ray.strategies.aggregation import Reducer
from hfedmoe_ray.strategies.rules import RuleSet, override
from hfedmoe_ray.types import ModelShape

SHAPE = ModelShape(layers=LAYERS, experts=EXPERTS, top_k=2, hidden=3, expert_bytes=1, shared_bytes=1, frozen_bytes=1)


def named(own=None, **rules):
    return override(own or RuleSet(), Rules(**rules), tau=1.0, lam=0.5, temperature=1.0, experts=EXPERTS)


def reduced(rules, updates, old=None):
    reducer = Reducer(old=old or weights(), router_layers=ROUTERS, layers=LAYERS, rules=rules)
    for one in updates:
        reducer.add(one, PLAN)
    return reducer.result(), reducer


def skewed(client, trained, samples):
    usage = np.random.default_rng(client).dirichlet(np.ones(EXPERTS), size=LAYERS)
    return update(client, trained, samples=samples, usage=usage)


UPDATES = [skewed(0, KEYS[:5], 3), skewed(1, KEYS[2:], 10), skewed(2, KEYS[::2], 30)]


@pytest.mark.parametrize(
    ("rule", "weigh"),
    [
        ("trained", lambda u, key: u.samples * (key in u.trained)),
        ("plain", lambda u, _: u.samples),
        ("usage_weighted", lambda u, key: u.profile.usage[key] * (key in u.trained)),
        ("usage_threshold", lambda u, key: u.samples * (u.profile.usage[key] >= 1 / EXPERTS)),
        ("sparsity_aware", lambda u, key: u.samples * (u.profile.usage[key] >= 1 / EXPERTS) * (key in u.trained)),
        ("frequency", lambda u, key: u.samples * (u.profile.routed[key] / 100) * (key in u.trained)),
    ],
)
def test_an_expert_is_the_mean_of_what_the_rule_says(rule, weigh):
    old = weights()
    new, _ = reduced(named(experts=rule), UPDATES, old)
    for key in KEYS:
        shares = np.array([weigh(one, key) for one in UPDATES], dtype=np.float64)
        values = np.stack([one.experts.get(key, old.experts[key])["w"] for one in UPDATES])
        if shares.sum() == 0:
            assert new.experts[key]["w"] is old.experts[key]["w"]
        else:
            np.testing.assert_allclose(new.experts[key]["w"], np.average(values, axis=0, weights=shares), rtol=1e-5)


def test_a_temperature_of_zero_forgets_frequencies():
    flat, _ = reduced(named(experts="frequency", temperature=0.0), UPDATES)
    plain, _ = reduced(named(experts="trained"), UPDATES)
    for key in KEYS:
        np.testing.assert_array_equal(flat.experts[key]["w"], plain.experts[key]["w"])


def test_a_row_follows_its_expert_and_rows_nobody_trained_keep_their_bits():
    old = weights()
    updates = [skewed(0, KEYS[:3], 3), skewed(1, KEYS[1:3] + KEYS[4:5], 10)]
    new, reducer = reduced(named(routers="rows"), updates, old)
    for name, layer in ROUTERS.items():
        for expert in range(EXPERTS):
            shares = np.array([one.samples * ((layer, expert) in one.trained) for one in updates], dtype=np.float64)
            assert reducer.rows[name][expert] == bool(shares.any())
            if not shares.any():
                np.testing.assert_array_equal(new.shared[name][expert], old.shared[name][expert])
                continue
            rows = np.stack([one.shared[name][expert] for one in updates])
            np.testing.assert_allclose(new.shared[name][expert], np.average(rows, axis=0, weights=shares), rtol=1e-5)


def test_a_router_rule_looks_at_the_experts_of_the_rule_beside_it():
    hfedmoe = build_strategy(configs.HFedMoE(lam=0.5), SHAPE, 0)
    kept = override(hfedmoe.rules, Rules(experts="plain"), tau=1.0, lam=0.5, temperature=1.0, experts=EXPERTS)
    every = UPDATES[0].profile.usage * UPDATES[0].profile.importance(0.5)
    np.testing.assert_allclose(kept.routers(UPDATES[0], PLAN, LAYERS), every.sum(axis=1))
    assert (hfedmoe.router_rule(UPDATES[0], PLAN, LAYERS) < every.sum(axis=1)).all()


def test_uniform_shared_parameters_do_not_ask_how_large_a_client_is():
    new, _ = reduced(named(shared="uniform"), UPDATES)
    np.testing.assert_allclose(
        new.shared["head"], np.mean([one.shared["head"] for one in UPDATES], axis=0), rtol=1e-5, atol=1e-7
    )


OTHERS = {"random": "fedavg", "fedprox": "fedavg", "frequency": "fedavg", "local": "fedavg"}
PRESET_OF = [
    *(({"name": name}, OTHERS.get(name, name)) for name in built_in()),
    ({"name": "hfedmoe", "tau": 0.7, "lam": 0.2}, "hfedmoe"),
    ({"name": "hfedmoe", "tau": 0.7, "participation": "usage", "gate_weights": "literal"}, "hfedmoe_literal"),
    ({"name": "flame", "temperature": 0.3}, "flame"),
]


@pytest.mark.parametrize(("config", "preset"), PRESET_OF, ids=str)
def test_a_paper_under_its_own_preset_is_the_paper_to_the_bit(config, preset):
    config = TypeAdapter(configs.StrategyConfig).validate_python(config)
    own, same = build_strategy(config, SHAPE, 0), build_strategy(config, SHAPE, 0, Rules(**PRESETS[preset]))
    assert (own.literal_router, own.private_router) == (same.literal_router, same.private_router)
    first, second = (reduced(strategy.rules, UPDATES)[0] for strategy in (own, same))
    for name, value in first.shared.items():
        np.testing.assert_array_equal(value, second.shared[name])
    for key in KEYS:
        np.testing.assert_array_equal(first.experts[key]["w"], second.experts[key]["w"])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("config", [configs.FedAvg(), configs.HFedMoE()], ids=lambda config: config.name)
def test_every_preset_fits_every_strategy(config, preset):
    rules = build_strategy(config, SHAPE, 0, Rules(**PRESETS[preset])).rules
    asked = named(**PRESETS[preset])
    assert type(rules.experts) is type(asked.experts)
    assert (rules.literal_router, rules.private_router) == (preset == "hfedmoe_literal", preset == "flex_moe")


def test_without_rules_a_strategy_keeps_its_own(quickstart):
    made = load_experiment(quickstart)
    strategy = build_strategy(made.strategy, SHAPE, 0, made.rules)
    assert strategy.rules == build_strategy(made.strategy, SHAPE, 0).rules
    assert load_experiment(quickstart, ["rules=fedmoe"]).rules == Rules(**PRESETS["fedmoe"])
    mixed = load_experiment(quickstart, ["rules.experts=frequency", "rules.temperature=2", "rules.routers=private"])
    assert mixed.rules == Rules(experts="frequency", temperature=2, routers="private")


def test_rules_are_crossed_with_a_strategy_by_configuration_alone(sources, tmp_path):
    """HFedMoE's clients, FLAME's experts, and FLEX-MoE's or FedMoE's routers: only what they name changes."""
    hashes, routers = set(), {}
    for name in (None, "private", "rows"):
        rules = {} if name is None else {"experts": "frequency", "routers": name, "shared": "uniform"}
        made = experiment(sources, rounds=1, rules=rules, evaluate={"own": "never"})
        context, summary, recorder = run(made, tmp_path / str(name))
        assert summary["clients"]["ok"] == 8
        hashes.add(summary["model_sha256"])
        weights = final_weights(context)
        routers[name] = {router: weights.shared[router] for router in router_layers(context.model)}
        kept = {} if weights.personal is None else weights.personal
        assert {client: set(own.shared) for client, own in kept.items()} == (
            {client: set(routers[name]) for client in range(4)} if name == "private" else {}
        )
    assert len(hashes) == 3
    start = initial_weights(context.model, "experts").shared
    trained = np.array(recorder.rounds[1].selected) > 0
    assert not trained.all()
    for router, layer in router_layers(context.model).items():
        moved = (routers["rows"][router] != start[router]).reshape(trained.shape[1], -1).any(axis=1)
        np.testing.assert_array_equal(moved, trained[layer])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rules.experts=trianed"], "Did you mean trained?"),
        (["rules=fedme"], "write one of fedavg, hfedmoe"),
        (["rules.tau=2"], "tau belongs to `experts: sparsity_aware or usage_threshold`"),
        (["rules.experts=plain", "rules.temperature=2"], "temperature belongs to `experts: frequency`"),
        (
            ["strategy=local", "rules.shared=uniform"],
            "averages nothing, so there is nothing for `rules`",
        ),
    ],
)
def test_rules_that_nothing_reads_are_refused(quickstart, overrides, said):
    with pytest.raises(ConfigError) as refused:
        load_experiment(quickstart, overrides)
    assert said in str(refused.value)
