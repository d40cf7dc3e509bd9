"""FFT-MoE: adapters that change nothing until they train, alike for every k_n, and a loss that keeps them balanced."""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from moe_models import FAMILIES, LABELS, batch, model_section, plan, prepare, save_bert, task_weights
from tiny_federation import experiment, final_weights, run
from transformers import AutoModelForSequenceClassification, BertModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from hfedmoe_ray.config import strategies as configs
from hfedmoe_ray.config.model import Model, Upcycle
from hfedmoe_ray.errors import ConfigError, ModelError
from hfedmoe_ray.federation.checkpoint import load_checkpoint, run_identity
from hfedmoe_ray.moe.prepare import initial_weights, save_full
from hfedmoe_ray.moe.routing import RoutingTape
from hfedmoe_ray.moe.shape import read_shape
from hfedmoe_ray.moe.subset import SparseModel, skeleton_from
from hfedmoe_ray.moe.upcycle.assemble import upcycle
from hfedmoe_ray.strategies import build_strategy
from hfedmoe_ray.strategies.fft_moe import jensen_shannon, load_of
from hfedmoe_ray.train.balance import balance_loss
from hfedmoe_ray.types import ClientInfo, ExpertKey, LoadBalance, ModelShape, RoutingProfile

ADAPTERS = {"how": "adapters", "experts": 6, "top_k": 2, "layers": [2, 3], "adapter_hidden": 8}
ALL_TRAIN = plan("TTTTTT", "TTTTTT")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


# ---------------------------------------------------------------------------------------------------- the adapters


@pytest.mark.parametrize("layers", [None, (1, 3)])
def test_fresh_adapters_are_the_dense_model_bit_for_bit(bert: Path, layers: tuple[int, ...] | None) -> None:
    dense = BertModel.from_pretrained(bert, add_pooling_layer=False).eval()
    config = Upcycle.model_validate(ADAPTERS | {"layers": layers})
    model, reports = upcycle(deepcopy(dense), config, 3, 0, [])
    assert not reports
    adapted = [number for number, layer in enumerate(model.layer) if hasattr(layer, "moe")]
    assert adapted == list(layers or range(4))
    ids, mask = batch(texts=20)
    with torch.no_grad():
        states = dense(input_ids=ids, attention_mask=mask).last_hidden_state
        ours = model._run(model.embeddings(input_ids=ids), mask, 0, 4)
    assert torch.equal(ours, states)
    # They are really in the path: another second layer, another output.
    torch.nn.init.normal_(model.layer[3].moe.experts.down_proj)
    assert not torch.equal(model._run(model.embeddings(input_ids=ids), mask, 0, 4), states)


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_a_clients_model_starts_as_the_frozen_one_whatever_its_k(bert: Path, tmp_path: Path, top_k: int) -> None:
    prepared = prepare(bert, tmp_path, upcycle=ADAPTERS)
    model = SparseModel(prepared.path)
    ids, mask = batch()
    model.bind(ALL_TRAIN, task_weights(prepared), "experts")
    expected = model.forward(ids, mask)
    model.bind(replace(ALL_TRAIN, top_k=top_k), task_weights(prepared), "experts")
    assert torch.equal(model.forward(ids, mask), expected)


def test_names_and_shapes_are_alike_for_every_k_and_only_adapters_routers_and_head_train(
    bert: Path, tmp_path: Path
) -> None:
    prepared = prepare(bert, tmp_path, upcycle=ADAPTERS)
    model = SparseModel(prepared.path)
    seen = []
    for top_k in (1, 3, 6):
        model.bind(replace(ALL_TRAIN, top_k=top_k), task_weights(prepared), "experts")
        experts = {(key, name): p.shape for key, named in model.expert_parameters.items() for name, p in named.items()}
        seen.append((experts, {name: p.shape for name, p in model.shared_parameters.items()}))
    assert seen[0] == seen[1] == seen[2]
    experts, shared = seen[0]
    assert {name: tuple(shape) for (_, name), shape in experts.items()} == {
        "up_proj": (8, 24),
        "up_bias": (8,),
        "down_proj": (24, 8),
    }
    assert set(shared) == {
        "layer.2.moe.gate.weight",
        "layer.3.moe.gate.weight",
        "classifier.weight",
        "classifier.bias",
    }


def test_k_changes_what_is_computed_not_its_scale(bert: Path, tmp_path: Path) -> None:
    """Adapters that are all the same give the same output at every k; each of k takes its part of the pairs."""
    prepared = prepare(bert, tmp_path, upcycle=ADAPTERS)
    weights = task_weights(prepared)
    rng = np.random.default_rng(0)
    one = {name: rng.normal(size=a.shape).astype(np.float32) for name, a in weights.experts[ExpertKey(0, 0)].items()}
    alike = replace(weights, experts=dict.fromkeys(weights.experts, one))
    model = SparseModel(prepared.path)
    ids, mask = batch()
    outputs, pairs = [], []
    for top_k in (1, 2, 6):
        model.bind(replace(ALL_TRAIN, top_k=top_k), alike, "experts")
        outputs.append(model.forward(ids, mask))
        pairs.append(sum(tokens for _, tokens in model.tape.outputs.values()))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs[0], outputs[2], rtol=1e-4, atol=1e-4)
    assert pairs == [2 * k * int(mask.sum()) for k in (1, 2, 6)]


def test_the_shape_of_adapters_is_known_beforehand(bert: Path, tmp_path: Path) -> None:
    for trainable in ("experts", "top", "full"):
        section = model_section(bert, upcycle=ADAPTERS, trainable=trainable)
        prepared = prepare(bert, tmp_path, upcycle=ADAPTERS, trainable=trainable)
        model = SparseModel(prepared.path)
        sizes = {name: p.numel() for name, p in model.module.named_parameters()}
        assert read_shape(section, LABELS) == prepared.shape == model.layout.shape(trainable, sizes)
    assert prepared.shape.expert_bytes == 4 * (2 * 24 * 8 + 8)


def test_trained_adapters_are_saved_and_read_back(bert: Path, tmp_path: Path) -> None:
    prepared = prepare(bert, tmp_path / "cache", upcycle=ADAPTERS)
    weights = initial_weights(prepared, "experts")
    rng = np.random.default_rng(1)
    trained = {
        key: {name: rng.normal(size=a.shape).astype(np.float32) for name, a in tensors.items()}
        for key, tensors in weights.experts.items()
    }
    save_full(prepared, replace(weights, experts=trained), tmp_path / "export")
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").eval()
    model = SparseModel(prepared.path)
    model.bind(ALL_TRAIN, replace(task_weights(prepared), experts=trained), "experts")
    ids, mask = batch()
    with torch.no_grad():
        torch.testing.assert_close(whole(ids, mask).logits, model.forward(ids, mask), rtol=1e-5, atol=1e-5)


def test_what_adapters_do_not_fit_is_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter_hidden"):
        Model.model_validate({"source": str(bert), "upcycle": ADAPTERS, "lora": {"rank": 2}})
    llama = tmp_path / "llama"
    llama.mkdir()
    (llama / "config.json").write_text('{"model_type": "llama", "intermediate_size": 48, "num_hidden_layers": 2}')
    with pytest.raises(ConfigError, match="no place for a dense FFN"):
        read_shape(Model.model_validate({"source": str(llama), "upcycle": ADAPTERS | {"layers": None}}))


def test_a_family_of_one_expert_a_token_takes_no_other_number() -> None:
    _, layout = skeleton_from({"model_type": "switch_transformers", **FAMILIES["switch_transformers"]})
    logits = torch.randn(2, 5, 6)
    assert layout.choose(0, logits, 1)[1].shape == (10, 1)
    with pytest.raises(ModelError, match="one expert"):
        layout.choose(0, logits, 2)


# -------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_without_its_extras_the_loss_is_switch_transformers(top_k: int) -> None:
    """transformers' sums f over the k choices of a token instead of averaging it: k times ours."""
    torch.manual_seed(0)
    logits = torch.randn(5 * 9, 6, requires_grad=True)
    _, mask = batch(texts=5)
    tape = RoutingTape(1)
    tape.differentiable = True
    tape.begin(mask)
    tape.record(0, logits, torch.softmax(logits, dim=-1).topk(top_k, dim=-1).indices)
    ours = balance_loss(tape, LoadBalance(weight=1.0))
    (gradient,) = torch.autograd.grad(ours, logits)
    theirs = load_balancing_loss_func((logits,), 6, top_k, mask)
    (expected,) = torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(top_k * ours, theirs)
    torch.testing.assert_close(top_k * gradient, expected)
    assert gradient.abs().sum() > 0


def test_the_cohorts_load_counts_by_rho() -> None:
    torch.manual_seed(0)
    tape = RoutingTape(2)
    tape.differentiable = True
    tape.begin(None)
    gates, loads = [], np.random.default_rng(0).dirichlet(np.ones(4), size=2)
    for layer in range(2):
        logits = torch.randn(7, 4)
        gates.append(torch.softmax(logits, dim=-1).numpy())
        tape.record(layer, logits, logits.topk(2, dim=-1).indices)
    term = LoadBalance(weight=0.5, rho=0.25, load=tuple(map(tuple, loads.tolist())))
    own = np.stack([np.bincount(np.argsort(-g)[:, :2].ravel(), minlength=4) / 14 for g in gates])
    mixed = 0.75 * own + 0.25 * loads
    expected = 0.5 * np.mean([4 * (mixed[i] * gates[i].mean(axis=0)).sum() for i in range(2)])
    assert float(balance_loss(tape, term)) == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------------------------------- the strategy

SHAPE = ModelShape(layers=2, experts=8, top_k=2, hidden=4, expert_bytes=1, shared_bytes=1, frozen_bytes=1)
CLIENTS = [
    ClientInfo(client=c, tier="t", resident_experts=held, batch_experts=held, samples=10)
    for c, held in enumerate([2, 4, 16])
]


def profile(routed: np.ndarray) -> RoutingProfile:
    usage = routed / routed.sum(axis=1, keepdims=True)
    return RoutingProfile(usage=usage, specific=usage, kl=usage, routed=routed, tokens=100)


def test_the_loss_weighs_more_for_few_active_experts_and_for_a_client_unlike_the_others() -> None:
    strategy = build_strategy(configs.FFTMoE(balance=0.1, a=2.0, b=3.0, rho=0.4), SHAPE, 0)
    rng = np.random.default_rng(0)
    routed = {c.client: rng.integers(0, 50, (2, 8)).astype(float) for c in CLIENTS}
    plans = strategy.plan(1, CLIENTS, {c: profile(r) for c, r in routed.items()})
    mean = np.mean([r / r.sum(axis=1, keepdims=True) for r in routed.values()], axis=0)
    for client, k in zip(CLIENTS, (1, 2, 8), strict=True):
        made = plans[client.client]
        assert (made.top_k, len(made.trainable), made.batch_budget) == (k, 16, None)
        load = load_of(profile(routed[client.client]))
        expected = 0.1 * (1 + 2.0 * (1 - k / 8) + 3.0 * jensen_shannon(load, mean))
        assert made.balance is not None
        assert made.balance.weight == pytest.approx(expected)
        assert made.balance.rho == 0.4
        np.testing.assert_allclose(made.balance.load, mean)
        assert strategy.deploy(1, CLIENTS, {})[client.client].top_k == k
    # Nobody has reported: the batch's own load alone. Off: no term at all.
    first = strategy.plan(1, CLIENTS, {})[0].balance
    assert first == LoadBalance(weight=pytest.approx(0.1 * (1 + 2.0 * 7 / 8)), rho=0.0)
    assert build_strategy(configs.FFTMoE(balance=0.0), SHAPE, 0).plan(1, CLIENTS, {})[0].balance is None


def test_divergence_of_loads_is_scipys() -> None:
    from scipy.spatial.distance import jensenshannon

    one, other = np.random.default_rng(0).dirichlet(np.ones(5), size=(2, 3))
    one[0, 1] = 0.0
    one /= one.sum(axis=1, keepdims=True)
    expected = np.mean([jensenshannon(a, b) ** 2 for a, b in zip(one, other, strict=True)])
    assert jensen_shannon(one, other) == pytest.approx(expected)
    assert jensen_shannon(one, one) == 0.0


# ------------------------------------------------------------------------------------------------------- whole runs


def federated(sources: Path, **changes: object):
    model = {"source": str(sources / "bert"), "upcycle": ADAPTERS, "trainable": "experts"}
    return experiment(sources, model=model, **changes)


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_two_rounds_train_every_adapter_and_nothing_else(
    sources: Path, tmp_path: Path, micro_batch: int | None
) -> None:
    made = federated(sources, strategy="fft_moe")
    tiers = tuple(
        tier.model_copy(update={"micro_batch": micro_batch, "checkpoint_activations": micro_batch is not None})
        for tier in made.clients.tiers
    )
    made = made.model_copy(update={"clients": made.clients.model_copy(update={"tiers": tiers})})
    context, summary, recorder = run(made, tmp_path / "run")
    assert summary["status"] == "finished"
    before, after = initial_weights(context.model, "experts"), final_weights(context)
    assert set(after.shared) == set(before.shared)
    for name, array in after.shared.items():
        assert (array != before.shared[name]).any()
    for key, tensors in after.experts.items():
        assert {name: a.shape for name, a in tensors.items()} == {
            name: a.shape for name, a in before.experts[key].items()
        }
        assert (tensors["down_proj"] != 0).any()
    # The backbone, read back from the exported model, is the dense one to the bit.
    save_full(context.model, after, tmp_path / "export")
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export").state_dict()
    dense = BertModel.from_pretrained(sources / "bert", add_pooling_layer=False).state_dict()
    backbone = {name.removeprefix("encoder."): tensor for name, tensor in dense.items()}
    assert backbone.keys() == exported.keys() - after.shared.keys() - {n for n in exported if ".experts." in n}
    assert all(torch.equal(exported[name], tensor) for name, tensor in backbone.items())
    assert all(record.trained == 12 for report in recorder.rounds[1:] for record in report.clients)


def test_the_loss_balances_the_load_under_label_skew(sources: Path, tmp_path: Path) -> None:
    """Coefficient of variation of the adapters' load after training under Dirichlet 0.1, with the loss and without."""
    data = {
        "source": str(sources / "texts.jsonl"),
        "max_length": 12,
        "partition": {"how": "dirichlet", "alpha": 0.1, "min_examples": 4},
    }
    local = {"steps": 8, "batch_size": 8, "learning_rate": 2e-2, "profile_examples": 8, "cache": "auto"}
    variation = []
    for balance in (0.0, 0.3):
        strategy = {"name": "fft_moe", "balance": balance}
        made = federated(sources, strategy=strategy, data=data, local=local, rounds=4)
        context, _, _ = run(made, tmp_path / str(balance))
        state = load_checkpoint(context.run_dir / "checkpoints", run_identity(context))
        load = np.sum([load_of(profile) for profile in state.profiles.values()], axis=0)
        variation.append((load.std(axis=1) / load.mean(axis=1)).mean())
    without, with_loss = variation
    assert with_loss < 0.5 * without
