"""Lossy uploads: what client and server agree on, what error feedback conserves, what a hostile payload comes to."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load, save

from hfedmoe_ray.config.wire import Wire
from hfedmoe_ray.federation.validation import NotAsTrained, Rejected, accept
from hfedmoe_ray.types import (
    ClientMetrics,
    ClientTask,
    ExpertKey,
    ExpertPlan,
    Role,
    RoutingProfile,
    TaskResult,
    TaskWeights,
    Weights,
)
from hfedmoe_ray.wire import Upload, checksum, expert_name, make_upload, read_upload

ONE, TWO = ExpertKey(0, 0), ExpertKey(0, 2)
PLAN = ExpertPlan(roles=((Role.TRAIN, Role.ABSENT, Role.TRAIN),))
GRID = np.full((1, 3), 1 / 3)
PROFILE = RoutingProfile(usage=GRID, specific=GRID, kl=GRID * 0, routed=GRID * 9, tokens=9)
LOSSY = [
    Wire(upload="bf16", error_feedback=True),
    Wire(upload="fp16", error_feedback=True),
    Wire(upload="int8", error_feedback=True),
    Wire(upload="topk", share=0.05),
]
by_name = pytest.mark.parametrize("wire", LOSSY, ids=[wire.upload for wire in LOSSY])


def tensors(rng, scale=1.0):
    return {
        "up": (rng.normal(size=(16, 40)) * scale).astype(np.float32),
        "down": (rng.normal(size=(40, 16)) * scale).astype(np.float32),
        "bias": (rng.normal(size=16) * scale).astype(np.float32),
    }


def published(seed=0):
    rng = np.random.default_rng(seed)
    experts = {ExpertKey(0, e): tensors(rng) for e in range(3)}
    return Weights(version=0, shared={"gate.weight": tensors(rng)["up"]}, experts=experts, means=np.zeros((1, 3, 4)))


def stepped(start, rng, scale=1e-3):
    return {
        name: value + tensor for (name, value), tensor in zip(start.items(), tensors(rng, scale).values(), strict=True)
    }


def upload(wire: Wire, weights: Weights, experts, shared, state=b"") -> Upload:
    start = TaskWeights(shared=weights.shared, experts=weights.experts, state=state)
    mean = np.float32([0.1, -2.7, 1e-20, 3e5])
    return make_upload(wire, start, experts, shared, profile=PROFILE, means={ONE: mean})


def answer(sent: Upload, weights: Weights, experts) -> TaskResult:
    """The result of a task that trained these experts."""
    metrics = ClientMetrics(
        client=1,
        round=1,
        kind="train",
        samples=5,
        tokens=9,
        loss=1.0,
        trained={expert_name(key): 2 for key in experts},
        before={expert_name(key): checksum(weights.experts[key]) for key in PLAN.trainable},
        after={expert_name(key): checksum(experts.get(key, weights.experts[key])) for key in PLAN.trainable},
        rebuilt=sent.rebuilt,
    )
    task = ClientTask(kind="train", round=1, client=1, seed=0, plan=PLAN, version=0)
    return TaskResult(task=task, status="ok", metrics=metrics, payload=lambda: sent.payload)


def trained(weights: Weights, seed=1):
    rng = np.random.default_rng(seed)
    shared = {name: value + np.float32(1e-3) * value[::-1] for name, value in weights.shared.items()}
    return {key: stepped(weights.experts[key], rng) for key in (ONE, TWO)}, shared


def test_fp32_sends_the_tensors_themselves_and_keeps_nothing():
    weights = published()
    experts, shared = trained(weights)
    sent = upload(Wire(), weights, experts, shared)
    assert sent.rebuilt == {}
    assert sent.state == b""
    update = accept(answer(sent, weights, experts), PLAN, weights, Wire())
    assert {key: checksum(value) for key, value in update.experts.items()} == {
        key: checksum(value) for key, value in experts.items()
    }


@by_name
def test_the_server_has_to_the_last_bit_what_the_client_says_it_will(wire: Wire):
    weights = published()
    experts, shared = trained(weights)
    sent = upload(wire, weights, experts, shared)
    update = accept(answer(sent, weights, experts), PLAN, weights, wire)
    assert {expert_name(key): checksum(value) for key, value in update.experts.items()} == sent.rebuilt
    for key, values in update.experts.items():
        for name, value in values.items():
            change = np.abs(experts[key][name] - weights.experts[key][name]).max()
            assert np.abs(value - experts[key][name]).max() <= change * (1.0 if wire.upload == "topk" else 0.005)
    mean, tokens = update.means[ONE]
    np.testing.assert_allclose(mean, [0.1, -2.7, 1e-20, 3e5], rtol=2**-8)
    assert tokens == 3
    for name in ("usage", "specific", "kl", "routed"):
        assert (getattr(update.profile, name) == getattr(PROFILE, name)).all(), "the method's numbers stay exact"


@by_name
def test_what_was_sent_and_what_is_owed_add_up_to_what_was_trained(wire: Wire):
    """Over rounds in which the weights move, and in which one expert is trained only now and then."""
    owed_experts, state = {}, b""
    sums = {
        key: {name: np.zeros_like(v, np.float64) for name, v in tensors(np.random.default_rng(0)).items()}
        for key in (ONE, TWO)
    }
    sent_sums = {key: {name: value.copy() for name, value in values.items()} for key, values in sums.items()}
    rng = np.random.default_rng(7)
    metrics = ClientMetrics(
        client=1, round=1, kind="train", samples=5, tokens=9, loss=1.0, trained={"0.0": 1, "0.2": 1}
    )
    for round in range(6):
        weights = published(round)
        keys = (ONE, TWO) if round in (0, 4) else (ONE,)
        experts = {key: stepped(weights.experts[key], rng, 0.1) for key in keys}
        sent = upload(wire, weights, experts, weights.shared, state)
        update = read_upload(sent.payload, metrics, wire, weights)
        for key in keys:
            for name, start in weights.experts[key].items():
                sums[key][name] += experts[key][name].astype(np.float64) - start
                sent_sums[key][name] += update.experts[key][name].astype(np.float64) - start
        owed_experts = load(sent.state)
        if round == 1:
            assert np.array_equal(owed_experts["expert.0.2.up"], load(state)["expert.0.2.up"]), "kept while not trained"
        state = sent.state
    lost = 0.0
    for key, values in sums.items():
        for name, total in values.items():
            owed = owed_experts[f"expert.{expert_name(key)}.{name}"]
            np.testing.assert_allclose(sent_sums[key][name] + owed, total, atol=6 * 2**-22, rtol=0)
            lost = max(lost, float(np.abs(owed).max()))
    assert lost > 4 * 6 * 2**-22, "nothing was owed: the test shows nothing"


def test_without_error_feedback_nothing_is_kept():
    weights = published()
    experts, shared = trained(weights)
    assert upload(Wire(upload="topk", error_feedback=False), weights, experts, shared).state == b""


def test_a_state_of_other_tensors_is_refused_in_words():
    weights = published()
    experts, shared = trained(weights)
    state = save({"expert.0.0.up": np.zeros((4, 4), np.float32)})
    with pytest.raises(ValueError, match=r"state holds \[4, 4\] numbers for up, which is \[16, 40\]"):
        upload(LOSSY[-1], weights, experts, shared, state)


@by_name
def test_an_update_that_arrives_other_than_it_was_sent_was_not_trained_as_planned(wire: Wire):
    weights = published()
    experts, shared = trained(weights)
    sent = upload(wire, weights, experts, shared)
    result = answer(sent, weights, experts)
    other = upload(
        wire, weights, {ONE: stepped(weights.experts[ONE], np.random.default_rng(5)), TWO: experts[TWO]}, shared
    )
    with pytest.raises(NotAsTrained, match=r"expert 0\.0 other than it arrived"):
        accept(replace(result, payload=lambda: other.payload), PLAN, weights, wire)
    assert result.metrics is not None
    unchanged = replace(result.metrics, after=result.metrics.before)
    with pytest.raises(NotAsTrained, match="unchanged"):
        accept(replace(result, metrics=unchanged), PLAN, weights, wire)


@by_name
def test_a_diverged_client_is_rejected_and_not_a_fault_of_ours(wire: Wire):
    weights = published()
    experts, shared = trained(weights)
    for bad in (np.nan, np.inf):
        experts[ONE]["up"][3, 3] = bad
        with pytest.raises(Rejected, match=r"NaN|infinit"):
            accept(answer(upload(wire, weights, experts, shared), weights, experts), PLAN, weights, wire)


def forged(tensors_: dict[str, np.ndarray], wire: Wire = LOSSY[2]) -> str:
    """Why a payload with these entries in place of its own is rejected."""
    weights = published()
    experts, shared = trained(weights)
    sent = upload(wire, weights, experts, shared)
    entries = {name: value for name, value in (load(sent.payload) | tensors_).items() if value is not None}
    with pytest.raises(Rejected) as caught:
        accept(answer(replace(sent, payload=save(entries)), weights, experts), PLAN, weights, wire)
    return str(caught.value)


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ({"expert.0.0.up:scale": np.full(4, -1, np.float32)}, "expert 0.0: up: a scale is negative"),
        ({"expert.0.0.up:scale": None}, "expert 0.0: up: it has the parts int8"),
        ({"expert.0.0.up:int8": np.zeros((16, 41), np.int8)}, "int8 is int8 [16, 41]"),
        ({"expert.0.0.up:int8": None, "expert.0.0.up:scale": None}, "unexpected or missing up"),
        ({"expert.0.0.up": np.zeros((16, 40), np.float32)}, "no tensor ''"),
        ({"expert.0.0.side:int8": np.zeros((16, 40), np.int8)}, "no tensor 'side'"),
        ({"expert.9.0.up:int8": np.zeros((16, 40), np.int8)}, "no expert 9.0"),
        ({"expert.0.1.up:int8": np.zeros((16, 40), np.int8)}, "0.1, which it does not say it trained"),
        ({"shared.gate.weight:int8": None, "shared.gate.weight:scale": None}, "missing gate.weight"),
        ({"shared.other:int8": np.zeros(3, np.int8)}, "no tensor 'other'"),
        ({"mean.0.7": np.zeros(4, np.uint16)}, "no expert 0.7 in the routing profile"),
        ({"mean.0.0": np.uint16([0x7FC0] * 4)}, "mean output"),
        ({"profile.routed": np.full((1, 3), np.inf)}, "tokens were routed"),
        ({"profile.routed": np.full((1, 3), -1.0)}, "tokens were routed"),
        ({"profile.routed": np.zeros(3)}, "in the routing profile"),
    ],
)
def test_a_forged_payload_is_rejected_with_its_reason(entries, told):
    assert told in forged(entries)


def test_a_header_that_promises_too_much_is_rejected():
    weights = published()
    experts, shared = trained(weights)
    result = answer(upload(LOSSY[2], weights, experts, shared), weights, experts)
    for shape, end in (([2**40, 2**40], 4), ([2**62, 4], 0), ([0, 2**62], 0), ([-1, 4], 4), ([2**31], 2**40)):
        header = json.dumps({"shared.x": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
        payload = len(header).to_bytes(8, "little") + header + bytes(4)
        with pytest.raises(Rejected):
            accept(replace(result, payload=lambda payload=payload: payload), PLAN, weights, LOSSY[2])


@by_name
def test_a_damaged_payload_never_ends_in_another_error(wire: Wire):
    weights = published()
    experts, shared = trained(weights)
    sent = upload(wire, weights, experts, shared)
    rng = np.random.default_rng(0)
    header = int.from_bytes(sent.payload[:8], "little")
    for trial in range(150):
        damaged = bytearray(sent.payload)
        place = rng.integers(0, 8 + header if trial % 2 else len(damaged))
        damaged[place] ^= 1 << int(rng.integers(8))
        try:
            accept(answer(replace(sent, payload=bytes(damaged)), weights, experts), PLAN, weights, wire)
        except Rejected:
            continue
