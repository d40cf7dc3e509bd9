"""Runs with secure aggregation in this process: the sum is exact, nothing else is told, and dropouts change nothing."""

import json
import pickle
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_up_updates import EXPERTS, KEYS, LAYERS, PLAN, ROUTERS, update, weights
from pydantic import ValidationError
from safetensors.numpy import load
from secure_worker import DroppingWorker, Faults
from tiny_federation import HFEDMOE, Recorder, experiment, final_weights, run

from hfedmoe_ray.config.secure import Secure
from hfedmoe_ray.context import RunContext
from hfedmoe_ray.errors import TrainingError
from hfedmoe_ray.federation.checkpoint import load_checkpoint, run_identity
from hfedmoe_ray.federation.executor import Executor
from hfedmoe_ray.runtime.local import LocalExecutor
from hfedmoe_ray.strategies import build_strategy
from hfedmoe_ray.strategies.aggregation import MeanOutputs, Reducer
from hfedmoe_ray.strategies.rules import (
    ActivationFrequency,
    GateWeights,
    PlainExperts,
    RuleSet,
    SparsityAware,
    UsageWeighted,
    WithTheirExpert,
    uniform,
)
from hfedmoe_ray.train.secure import SecureClients
from hfedmoe_ray.trust.secure.aggregate import Aggregate, read_sums
from hfedmoe_ray.trust.secure.keys import Secrets, secrets_of
from hfedmoe_ray.trust.secure.layout import Layout, make_layout
from hfedmoe_ray.trust.secure.session import Session
from hfedmoe_ray.types import TaskResult, TaskWeights, Weights

TIERS = [
    {"name": "phone", "share": 0.5, "experts": 0.25, "device": 0.1},
    {"name": "server", "share": 0.5, "experts": 0.5, "device": 0.1},
]
CLIENTS = {"count": 7, "tiers": TIERS}
USE = SparsityAware(threshold=0.2)
RULES = {
    "fedavg": RuleSet(),
    "plain": RuleSet(experts=PlainExperts(), shared=uniform),
    "hfedmoe": RuleSet(experts=USE, routers=GateWeights(experts=USE, lam=0.9), anchor=0.8),
    "literal": RuleSet(experts=USE, routers=GateWeights(experts=USE, lam=0.9), literal_router=True),
    "rows": RuleSet(experts=UsageWeighted(), routers=WithTheirExpert(experts=UsageWeighted())),
    "frequency": RuleSet(experts=ActivationFrequency(temperature=1.0)),
}


@pytest.mark.parametrize("variant", ["padded", "grouped"])
@pytest.mark.parametrize("rules", RULES)
def test_the_sum_of_vectors_gives_the_averages_that_single_updates_give(rules: str, variant: str):
    rng = np.random.default_rng(1)
    old = weights()
    usage = {client: rng.dirichlet(np.ones(EXPERTS), LAYERS) for client in range(3)}
    means = {client: {key: (rng.normal(size=3).astype(np.float32), 5 + client) for key in KEYS} for client in range(3)}
    updates = [
        replace(update(0, KEYS[:5], usage=usage[0], samples=7), means=means[0]),
        replace(update(1, KEYS[:3], usage=usage[1], samples=20), means=means[1]),
        update(2, KEYS[:6], usage=usage[2], samples=11),
    ]
    secure = Secure(variant=variant, ring=64, clip=10.0)
    plans = dict.fromkeys(range(3), PLAN)
    layout = make_layout(secure, RULES[rules], old, plans, routers=ROUTERS, shape=(LAYERS, EXPERTS), max_tokens=1000)
    start = TaskWeights(shared=old.shared, experts=old.experts)
    vectors = [layout.encode(one, PLAN, start, RULES[rules], loss=float(one.client)) for one in updates]
    found = read_sums(layout, [np.add.reduce(blocks) for blocks in zip(*vectors, strict=True)])
    averaged, rows = found.averaged(old, RULES[rules], clients=3, fewest=1)

    reducer, mean_outputs = Reducer(old, ROUTERS, LAYERS, RULES[rules]), MeanOutputs()
    for one in updates:
        reducer.add(one, PLAN)
        mean_outputs.add(one)
    expected = reducer.result()
    assert found.counts.keys() == reducer.participants
    for name, value in expected.shared.items():
        np.testing.assert_allclose(averaged.shared[name], value, atol=1e-6)
        assert (averaged.shared[name] is old.shared[name]) == (value is old.shared[name])
    for key, tensors in expected.experts.items():
        np.testing.assert_allclose(averaged.experts[key]["w"], tensors["w"], atol=1e-6)
        assert key in reducer.participants or averaged.experts[key]["w"] is old.experts[key]["w"]
    for name, which in rows.items():
        np.testing.assert_array_equal(which, reducer.rows[name])
    np.testing.assert_allclose(found.means(old.means), mean_outputs.result(old.means), atol=1e-6)
    assert found.loss == pytest.approx(1.0)
    assert found.clipped == 0


def test_what_is_clipped_is_counted():
    """A client with as many examples as any may have: what it changed by more than `clip` is cut."""
    old, sent = weights(), update(0, KEYS[:1], samples=10)
    options = Secure(clip=0.5, max_samples=10, ring=64)
    layout = make_layout(options, RuleSet(), old, {0: PLAN, 1: PLAN}, routers=ROUTERS, shape=(2, 4), max_tokens=1000)
    vector = layout.encode(sent, PLAN, TaskWeights(shared=old.shared, experts=old.experts), RuleSet(), loss=1.0)
    changes = [sent.experts[KEYS[0]]["w"] - old.experts[KEYS[0]]["w"]]
    changes += [value - old.shared[name] for name, value in sent.shared.items()]
    found = read_sums(layout, vector)
    assert found.clipped == sum(int((np.abs(change) > 0.5).sum()) for change in changes) > 0
    cut = old.experts[KEYS[0]]["w"] + np.clip(changes[0], -0.5, 0.5)
    averaged = found.averaged(old, RuleSet(), clients=1, fewest=1)[0]
    np.testing.assert_allclose(averaged.experts[KEYS[0]]["w"], cut, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- whole runs


class Watched(LocalExecutor):
    """Keeps what the server was sent."""

    def __init__(self, context: RunContext, **options: Any) -> None:
        super().__init__(context, **options)
        self.seen: list[tuple[TaskResult, bytes]] = []

    def run(self, *arguments: Any, **options: Any) -> Iterator[TaskResult]:
        for result in super().run(*arguments, **options):
            self.seen.append((result, result.payload() if result.payload else b""))
            yield result


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[Layout, list[np.ndarray]]]:
    """What each client has encoded in the last round, before it was masked, of all experts."""
    vectors: dict[int, tuple[Layout, list[np.ndarray]]] = {}
    encode = Layout.encode

    def noted(layout: Layout, sent: Any, *arguments: Any, **options: Any) -> list[np.ndarray]:
        values = encode(layout, sent, *arguments, **options)
        vectors[sent.client] = layout, [value.copy() for value in values]
        return values

    monkeypatch.setattr(Layout, "encode", noted)
    return vectors


def plain_sum(vectors: dict[int, tuple[Layout, list[np.ndarray]]], clients: set[int]) -> Aggregate:
    layout = vectors[min(clients)][0]
    totals = [np.zeros(block.size, vectors[min(clients)][1][0].dtype) for block in layout.blocks()]
    for client in clients:
        for total, one in zip(totals, vectors[client][1], strict=True):
            if len(one):
                np.add(total, one, out=total)
    return read_sums(layout, totals)


def same(one: Weights, other: Weights, atol: float = 0.0) -> None:
    for name, value in one.shared.items():
        np.testing.assert_allclose(other.shared[name], value, rtol=0, atol=atol)
    for key, tensors in one.experts.items():
        for name, value in tensors.items():
            np.testing.assert_allclose(other.experts[key][name], value, rtol=0, atol=atol)


def with_faults(faults: Faults, context: RunContext) -> Executor:
    return Watched(context, worker_factory=partial(DroppingWorker, faults=faults))


def secure_run(
    sources: Path, run_dir: Path, *, faults: Faults | None = None, secure: dict[str, Any] | None = None, **changes: Any
) -> tuple[RunContext, dict[str, Any], Recorder, list[tuple[TaskResult, bytes]]]:
    """One round of seven clients (or as `changes` have it); returns also what the server was sent."""
    options = {"strategy": "fedavg", "rounds": 1, "evaluate": {"own": "never"}}
    options |= {"clients": CLIENTS, "secure": secure or {}}
    kept: list[Watched] = []

    def where(context: RunContext) -> Executor:
        kept.append(with_faults(faults or {}, context))  # type: ignore[arg-type]
        return kept[0]

    context, summary, recorder = run(experiment(sources, **(options | changes)), run_dir, where=where)
    return context, summary, recorder, kept[0].seen


def kept(context: RunContext) -> list[tuple[bytes, Secrets]]:
    """What the clients of a run have on their node, and what they derived from it in its last session."""
    found = []
    for file in SecureClients(context).directory.glob("*.key"):
        latest, _ = json.loads(file.with_suffix(".answered").read_text())
        session = Session(number=latest, threshold=5, ring=context.experiment.secure.ring)
        found.append((file.read_bytes(), secrets_of(file.read_bytes(), session.name)))
    assert len(found) == 7
    return found


@pytest.mark.parametrize(
    ("strategy", "secure"),
    [
        ("fedavg", {"variant": "padded"}),
        (HFEDMOE, {"variant": "padded", "profiles": "clear"}),
        (HFEDMOE, {"variant": "grouped", "profiles": "clear", "ring": 64}),
    ],
)
def test_a_round_ends_with_the_plain_sum_and_the_server_is_sent_nothing_else(
    sources: Path, tmp_path: Path, encoded: dict[int, Any], strategy: Any, secure: dict[str, Any]
):
    context, summary, recorder, seen = secure_run(sources, tmp_path / "secure", strategy=strategy, secure=secure)
    assert summary["status"] == "finished"
    (told,) = [fields for name, fields in recorder.events if name == "aggregated"]
    assert told["delivered"] == told["unmasked"] == list(range(7))
    # Exactly: the weights are those that the plain sum of fixed-point numbers gives, to the last bit.
    first = run(experiment(sources, strategy=strategy, rounds=1, clients=CLIENTS), tmp_path / "start", stop_after=0)[0]
    start, after = final_weights(first), final_weights(context)
    rules = build_strategy(context.experiment.strategy, context.model.shape, 0).rules
    same(plain_sum(encoded, set(range(7))).averaged(start, rules, 7, 2)[0], after)
    # And up to rounding, those of a run whose server sees everything, but for experts that one client trained.
    plain, _, clear = run(
        experiment(sources, strategy=strategy, rounds=1, clients=CLIENTS, evaluate={"own": "never"}), tmp_path / "plain"
    )
    expected = final_weights(plain)
    counts = np.array(clear.rounds[-1].selected)
    for key, tensors in expected.experts.items():
        if counts[key] != 1:
            for name, value in tensors.items():
                np.testing.assert_allclose(after.experts[key][name], value, rtol=0, atol=2e-6)
    for name, value in expected.shared.items():
        np.testing.assert_allclose(after.shared[name], value, rtol=0, atol=2e-6)
    assert recorder.rounds[-1].loss == pytest.approx(clear.rounds[-1].loss, abs=1e-4)
    np.testing.assert_allclose(recorder.rounds[-1].usage, clear.rounds[-1].usage, atol=1e-6)

    hidden = [secret for root, own in kept(context) for secret in (root, own.letters, own.masks, own.seed)]
    known = [own.public.masks for _, own in kept(context)]
    sizes = set()
    for result, payload in seen:
        travels = payload + pickle.dumps(replace(result.task, state=None))
        assert not any(secret in travels for secret in hidden)
        assert result.task.kind != "shares" or all(key in travels for key in known)
        if result.task.kind == "train":
            metrics = result.metrics
            assert not metrics.trained and not metrics.after and not metrics.before
            assert np.isnan(metrics.loss)
            open_names = {name for name in load(payload) if not name.startswith("masked.")}
            assert all(name.startswith("profile.") for name in open_names)
            assert bool(open_names) == (secure.get("profiles") == "clear")
        if result.task.kind == "upload":
            sizes.add(len(payload))
            tensors, layout = load(payload), result.task.secure.layout
            # What a single client trained is not even sent.
            assert set(layout.experts) == {key for key in expected.experts if counts[key] > 1}
            full, vector = encoded[result.task.client]
            for number, block in enumerate(layout.chosen(vector, full)):
                assert len(block) == len(tensors.get(f"masked.{number}", ()))
                assert not len(block) or (tensors[f"masked.{number}"] != block).mean() > 0.99
    np.testing.assert_array_equal(recorder.rounds[-1].selected, np.where(counts > 1, counts, 0))
    assert (len(sizes) == 1) == (secure["variant"] == "padded"), "padded vectors have one size, whatever was trained"


def test_clients_that_leave_at_any_step_are_made_up_for(sources: Path, tmp_path: Path, encoded: dict[int, Any]):
    """One each after nothing, its keys, its shares, its training, and its upload: of fourteen, nine must stay."""
    steps = ("keys", "shares", "train", "upload", "unmask")
    faults: Faults = {(step, 2 * number + 1): "fail" for number, step in enumerate(steps)}
    clients = {"count": 14, "tiers": TIERS}
    context, summary, recorder, _ = secure_run(sources, tmp_path / "run", faults=faults, clients=clients)
    (told,) = [fields for name, fields in recorder.events if name == "aggregated"]
    left = set(range(14))
    for gone, step in zip((1, 3, 5, 7, 9), ("keys", "shares", "counted", "delivered", "unmasked"), strict=True):
        left -= {gone}
        assert told[step] == sorted(left), step
    assert told["silent"] == {9: "RuntimeError: client 9 is gone"}
    records = {record.client: record for record in recorder.rounds[-1].clients}
    assert {client: record.kind for client, record in records.items() if record.status == "failed"} == {
        1: "keys",
        3: "shares",
        5: "train",
        7: "train",
    }
    assert records[7].reason == "RuntimeError: client 7 is gone"
    assert records[9].status == "ok", "its update is in the sum"
    assert summary["clients"]["failed"] == 4
    start = final_weights(
        run(experiment(sources, strategy="fedavg", clients=clients), tmp_path / "start", stop_after=0)[0]
    )
    expected = plain_sum(encoded, left | {9}).averaged(start, RuleSet(), 10, 2)[0]
    same(expected, final_weights(context))


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        (
            {("shares", client): "fail" for client in range(2)} | {("train", 2): "fail"},
            "only 4 clients delivered a masked",
        ),
        (
            {("unmask", client): "fail" for client in range(3)},
            "only 4 of 7 clients helped to take the masks off the sum",
        ),
    ],
)
def test_below_the_threshold_the_round_fails_and_nothing_is_known(
    sources: Path, tmp_path: Path, faults: Faults, told: str
):
    with pytest.raises(TrainingError, match=told):
        secure_run(sources, tmp_path / "run", faults=faults, runtime={"quorum": 0.1, "round_attempts": 1})


def test_a_run_repeats_to_the_last_bit_in_either_variant_and_resumes(sources: Path, tmp_path: Path):
    options = {"strategy": HFEDMOE, "evaluate": {"own": "never"}}
    padded, made = (
        experiment(sources, **options, secure={"variant": variant, "profiles": "clear"})
        for variant in ("padded", "grouped")
    )
    whole = run(padded, tmp_path / "whole")[1]
    run(made, tmp_path / "cut", stop_after=1)
    assert run(made, tmp_path / "cut", resume=True)[1]["model_sha256"] == whole["model_sha256"]


def test_where_the_choice_is_private_too_one_answer_is_all_that_is_told_in_the_clear(sources: Path, tmp_path: Path):
    made = experiment(
        sources,
        strategy={"name": "hfedmoe", "tau": 0.5, "unselected": "reroute"},
        secure={"profiles": "clear"},
        privacy={"selection": {"how": "response", "epsilon": 1.0, "noise_seed": 3}},
    )
    context, _, _ = run(made, tmp_path / "run")
    profiles = load_checkpoint(context.run_dir / "checkpoints", run_identity(context)).profiles
    assert profiles and all(set(np.unique(one.usage)) <= {0.0, 1.0} for one in profiles.values())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"privacy": {"central": {"epsilon": 4.0, "clip": 1.0, "delta": 0.01}}, "evaluate": {"own": "never"}},
            "is not built",
        ),
        ({"robust": {"rule": "median"}}, "sees no single update"),
        ({"strategy": "hfedmoe"}, "plans by each client's routing profile: write `secure.profiles: clear`"),
        ({"strategy": "flex_moe"}, "learns from what each client measures"),
        ({"strategy": "local"}, "averages nothing"),
        ({"strategy": "flame"}, "strategy.rescale: false"),
        ({"strategy": "fft_moe"}, "strategy.balance: 0"),
        ({"rules": {"routers": "private"}}, "keeps each client's router"),
        ({"wire": {"upload": "int8"}}, "leave `wire` out"),
        ({"secure": {"threshold": 0.5}}, "more than 0.5"),
        ({"clients": {"count": 4, "tiers": TIERS, "failure_rate": 0.5}}, "lower one of them"),
        ({"clients": {"count": 2, "tiers": TIERS}}, "at least 3 clients"),
    ],
)
def test_what_sums_cannot_do_is_refused(sources: Path, changes: dict[str, Any], told: str):
    with pytest.raises(ValidationError, match=told):
        experiment(sources, **({"strategy": "fedavg", "secure": {}} | changes))
