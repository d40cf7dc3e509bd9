"""A client's part of a model computes what the whole model would, and keeps to itself what it changes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from moe_models import LABELS, batch, plan, prepare, save_bert, save_mixtral, task_weights
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hfedmoe_ray.context import PreparedModel
from hfedmoe_ray.errors import ModelError
from hfedmoe_ray.moe.layout import layout_of
from hfedmoe_ray.moe.prepare import initial_weights, save_full
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.types import ExpertKey, ExpertPlan, TaskWeights

pytestmark = pytest.mark.usefixtures("one_thread")
ALL_TRAIN = plan("TTTTTT", "TTTTTT")
PARTLY = plan("T.F.T.", ".TT.F.")


@pytest.fixture(scope="module", params=["encoder", "mixtral"])
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreparedModel:
    root = tmp_path_factory.mktemp(request.param)
    source = (save_bert if request.param == "encoder" else save_mixtral)(root / "source")
    return prepare(source, root / "cache")


@pytest.fixture(scope="module")
def whole(prepared: PreparedModel, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """The full model as transformers itself loads it from an export."""
    directory = tmp_path_factory.mktemp("export")
    save_full(prepared, initial_weights(prepared, "top"), directory)
    return AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.float32).eval()


def bound(prepared: PreparedModel, plan: ExpertPlan, trainable: str = "top") -> SparseModel:
    model = SparseModel(prepared.path)
    model.bind(plan, task_weights(prepared, trainable), trainable)
    return model


def loss_of(model: SparseModel) -> torch.Tensor:
    ids, mask = batch()
    return cross_entropy(model.forward(ids, mask), torch.arange(len(ids)) % LABELS)


def snapshot(model: SparseModel) -> dict[str, np.ndarray]:
    """Everything a binding exposes: outputs, gradients, weights."""
    model.module.zero_grad()
    loss_of(model).backward()
    ids, mask = batch()
    values = {f"shared {n}": a for n, a in model.read_shared().items()}
    values |= {f"grad {n}": p.grad.numpy() for n, p in model.module.named_parameters() if p.grad is not None}
    values |= {f"routing {i}": p.numpy() for i, p in enumerate(model.tape.probabilities) if p is not None}
    return values | {"logits": model.forward(ids, mask).detach().numpy()}


def test_holding_every_expert_is_the_whole_model(prepared: PreparedModel, whole: PreTrainedModel) -> None:
    ids, mask = batch()
    expected = whole(input_ids=ids, attention_mask=mask).logits
    for roles in ("TTTTTT", "FFFFFF", "TFTFTF"):
        logits = bound(prepared, plan(roles, roles)).forward(ids, mask)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_another_top_k_equals_a_model_made_with_it(prepared: PreparedModel, whole: PreTrainedModel) -> None:
    model = bound(prepared, replace(ALL_TRAIN, top_k=1))
    routers = [module for module in whole.modules() if hasattr(module, "top_k")]
    ids, mask = batch()
    own = whole(input_ids=ids, attention_mask=mask).logits
    assert routers
    for router in routers:
        router.top_k, before = 1, router.top_k
    try:
        expected = whole(input_ids=ids, attention_mask=mask).logits
    finally:
        for router in routers:
            router.top_k = before
    torch.testing.assert_close(model.forward(ids, mask), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(own, expected, atol=1e-4)
    model.bind(ALL_TRAIN, task_weights(prepared), "top")
    torch.testing.assert_close(model.forward(ids, mask), own, rtol=1e-5, atol=1e-5)


def test_rerouting_equals_cutting_the_router_and_the_experts(prepared: PreparedModel, whole: PreTrainedModel) -> None:
    """The reference masks the whole model's router logits: softmax, top-k and normalisation over what is present."""
    reroute = plan("T.T.T.", ".TTT..", absent="reroute")
    model = bound(prepared, reroute)
    layout = layout_of(whole)

    def mask_router(layer: int) -> torch.utils.hooks.RemovableHandle:
        absent = torch.tensor([role == 0 for role in reroute.roles[layer]])

        def hook(_router: object, _args: object, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            logits = output[0].masked_fill(absent, float("-inf"))
            return logits, *layout.choose(layer, logits, 2)

        return layout.router(layer).register_forward_hook(hook)

    handles = [mask_router(layer) for layer in range(2)]
    ids, mask = batch()
    labels = torch.arange(len(ids)) % LABELS
    expected = whole(input_ids=ids, attention_mask=mask).logits
    whole.zero_grad()
    cross_entropy(expected, labels).backward()
    for handle in handles:
        handle.remove()
    logits = model.forward(ids, mask)
    cross_entropy(logits, labels).backward()
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    whole_parameters = dict(whole.named_parameters())
    for name, parameter in model.shared_parameters.items():
        torch.testing.assert_close(parameter.grad, whole_parameters[name].grad, rtol=1e-4, atol=1e-6)
    for key, tensors in model.expert_parameters.items():
        experts = getattr(layout.blocks[key.layer], layout.experts_name)
        for name, parameter in tensors.items():
            torch.testing.assert_close(
                parameter.grad, getattr(experts, name).grad[key.expert], rtol=1e-4, atol=1e-6, msg=f"{key} {name}"
            )


def test_rerouting_to_fewer_experts_than_top_k_uses_them_all(prepared: PreparedModel) -> None:
    model = bound(prepared, plan("T.....", "..T...", absent="reroute"))
    ids, mask = batch()
    assert torch.isfinite(model.forward(ids, mask)).all()
    assert [set(index.unique().tolist()) for index in model.tape.index if index is not None] == [{0}, {2}]


def test_an_absent_expert_is_replaced_by_its_mean_or_left_out(prepared: PreparedModel) -> None:
    """`mean` equals holding experts that return their mean whatever the token; with means of 0 it equals `drop`."""
    weights = task_weights(prepared)
    model = SparseModel(prepared.path)
    ids, mask = batch()
    logits = {}
    for absent in ("mean", "drop"):
        model.bind(plan("T.F.T.", ".TT.F.", absent=absent), weights, "top")
        logits[absent] = model.forward(ids, mask)
    assert not torch.allclose(logits["mean"], logits["drop"])
    assert weights.means is not None
    zero = TaskWeights(shared=weights.shared, experts=weights.experts, means=np.zeros_like(weights.means))
    model.bind(PARTLY, zero, "top")
    torch.testing.assert_close(model.forward(ids, mask), logits["drop"])

    model.bind(ALL_TRAIN, weights, "top")
    present, means = set(PARTLY.present), torch.from_numpy(weights.means)
    compute = model.layout.expert_forward

    def constant(tokens: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        key = next(key for key, own in model.expert_parameters.items() if own["down_proj"] is tensors["down_proj"])
        return compute(tokens, tensors) if key in present else means[key].expand(len(tokens), -1)

    model.layout.expert_forward = constant  # type: ignore[method-assign]
    torch.testing.assert_close(model.forward(ids, mask), logits["mean"], rtol=1e-5, atol=1e-5)


def test_mean_outputs_are_required_only_where_they_are_used(prepared: PreparedModel) -> None:
    weights = task_weights(prepared)
    without = TaskWeights(shared=weights.shared, experts=weights.experts)
    model = SparseModel(prepared.path)
    model.bind(ALL_TRAIN, without, "top")
    model.bind(plan("T.....", "T.....", absent="drop"), without, "top")
    with pytest.raises(ValueError, match="mean output"):
        model.bind(PARTLY, without, "top")


def test_padding_changes_nothing(prepared: PreparedModel) -> None:
    """The same texts in a wider batch give the same logits, profile and gradients."""
    model = bound(prepared, PARTLY)
    ids, mask = batch()
    logits = model.forward(ids, mask)
    counts = model.tape.counts()
    wider = torch.nn.functional.pad(ids, (0, 5)), torch.nn.functional.pad(mask, (0, 5))
    torch.testing.assert_close(model.forward(*wider), logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(model.tape.counts(), counts)
    assert model.tape.tokens == int(mask.sum())


def test_trained_experts_are_private_and_frozen_ones_alias_the_published_arrays(prepared: PreparedModel) -> None:
    weights = task_weights(prepared)
    model = SparseModel(prepared.path)
    model.bind(PARTLY, weights, "top")
    for key in PARTLY.present:
        for name, tensor in model._residents[key.layer].tensors_of(key.expert).items():
            same = tensor.data_ptr() == weights.experts[key][name].ctypes.data
            assert same == (key not in PARTLY.trainable), (key, name)
    for name, parameter in model.shared_parameters.items():
        assert parameter.data_ptr() != weights.shared[name].ctypes.data
        assert parameter.data_ptr() != model._base[name].data_ptr()


def test_a_training_step_writes_only_what_trains(prepared: PreparedModel) -> None:
    weights = task_weights(prepared)
    published = {key: {n: a.copy() for n, a in tensors.items()} for key, tensors in weights.experts.items()}
    model = SparseModel(prepared.path)
    model.bind(PARTLY, weights, "top")
    base = {name: tensor.clone() for name, tensor in model._base.items()}
    trained = [p for p in model.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.1)
    loss_of(model).backward()
    optimizer.step()
    routed = model.tape.counts()
    for key, tensors in weights.experts.items():
        for name, array in tensors.items():
            np.testing.assert_array_equal(array, published[key][name])
    assert all(torch.equal(model._base[name], tensor) for name, tensor in base.items())
    moved = {
        key
        for key in PARTLY.present
        if any((model.read_expert(key)[n] != published[key][n]).any() for n in published[key])
    }
    assert moved
    assert moved == {key for key in PARTLY.trainable if routed[key]}
    assert len(trained) == len(model.shared_parameters) + sum(map(len, model.expert_parameters.values()))


@pytest.mark.parametrize("first_trainable", ["full", "experts"])
def test_binding_again_leaves_no_trace(prepared: PreparedModel, first_trainable: str) -> None:
    """A model that trained another client is bit-identical to a fresh one after the next bind."""
    used = bound(prepared, plan("TTTFFF", "F..TTT", absent="reroute"), first_trainable)
    optimizer = torch.optim.AdamW([p for p in used.module.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        loss_of(used).backward()
        optimizer.step()
    weights = task_weights(prepared, "full")
    used.bind(PARTLY, weights, "top")
    fresh = SparseModel(prepared.path)
    fresh.bind(PARTLY, weights, "top")
    before, after = snapshot(used), snapshot(fresh)
    assert before.keys() == after.keys()
    for name, array in after.items():
        np.testing.assert_array_equal(before[name], array, err_msg=name)


def test_only_the_configured_parameters_train(prepared: PreparedModel) -> None:
    names = {
        trainable: set(bound(prepared, PARTLY, trainable).shared_parameters) for trainable in ("experts", "top", "full")
    }
    assert names["experts"] < names["top"] < names["full"]
    model = bound(prepared, PARTLY, "full")
    assert names["full"] == {name for name, _ in model.module.named_parameters() if ".experts." not in name}
    assert set(model.layout.router_layers) <= names["experts"]
    assert not any("embed" in name.lower() for name in names["top"])
    top = names["top"] - names["experts"]
    assert any("attn" in n or "attention" in n for n in top)
    assert any("norm" in n.lower() for n in top)


def test_shape_counts_the_bytes_of_what_is_bound(prepared: PreparedModel) -> None:
    model = bound(prepared, ALL_TRAIN)
    assert model.shape == prepared.shape
    shared = sum(4 * p.numel() for p in model.shared_parameters.values())
    assert model.shape.shared_bytes == shared
    assert model.shape.expert_bytes == 4 * sum(p.numel() for p in model.expert_parameters[ExpertKey(0, 0)].values())
    everything = sum(4 * p.numel() for p in model.module.parameters())
    assert model.shape.frozen_bytes == everything - shared - 12 * model.shape.expert_bytes


def test_reads_are_copies(prepared: PreparedModel) -> None:
    model = bound(prepared, PARTLY)
    expert, shared = model.read_expert(ExpertKey(0, 0)), model.read_shared()
    expected = task_weights(prepared)
    for arrays, published in ((expert, expected.experts[ExpertKey(0, 0)]), (shared, expected.shared)):
        assert arrays.keys() == published.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, published[name])
            np.add(array, 1.0, out=array)
    assert (model.read_expert(ExpertKey(0, 0))["down_proj"] != expert["down_proj"]).all()


def test_incomplete_weights_are_refused(prepared: PreparedModel) -> None:
    weights = task_weights(prepared)
    model = SparseModel(prepared.path)
    some = {key: tensors for key, tensors in weights.experts.items() if key != ExpertKey(0, 2)}
    with pytest.raises(ValueError, match=r"expert 0\.2"):
        model.bind(PARTLY, TaskWeights(shared=weights.shared, experts=some, means=weights.means), "top")
    with pytest.raises(ValueError, match="is missing"):
        model.bind(PARTLY, TaskWeights(shared={}, experts=weights.experts, means=weights.means), "top")
    with pytest.raises(ValueError, match="6"):
        model.bind(plan("TT", "TT"), weights, "top")


def test_prefix_is_exact(prepared: PreparedModel) -> None:
    ids, mask = batch()
    model = bound(prepared, PARTLY)
    if prepared.path.joinpath("model_config.json").read_text().find("mixtral") >= 0:
        assert not model.supports_prefix
        return
    assert model.supports_prefix
    hidden = model.prefix(ids, mask).detach()
    from_prefix = torch.autograd.grad(model.forward(ids, mask, hidden).sum(), list(model.shared_parameters.values()))
    logits = model.forward(ids, mask)
    assert torch.equal(model.forward(ids, mask, hidden), logits)
    for ours, theirs in zip(
        from_prefix, torch.autograd.grad(logits.sum(), model.shared_parameters.values()), strict=True
    ):
        assert torch.equal(ours, theirs)
    model.bind(PARTLY, task_weights(prepared, "full"), "full")
    assert not model.supports_prefix


def test_autocast_trains_fp32_parameters(prepared: PreparedModel) -> None:
    model = bound(prepared, PARTLY)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model).float()
    loss.backward()
    gradients = [p.grad for tensors in model.expert_parameters.values() for p in tensors.values()]
    assert all(g is None or g.dtype == torch.float32 for g in gradients)
    assert any(g is not None for g in gradients)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no prepared model"):
        SparseModel(tmp_path)
