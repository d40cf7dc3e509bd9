"""Upcycling a BERT keeps it: exactly where it can, measurably closer after calibration where it cannot."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from moe_models import batch, save_bert
from transformers import BertModel

from hfedmoe_ray.config.model import Upcycle
from hfedmoe_ray.moe.encoder import MoEEncoderForSequenceClassification
from hfedmoe_ray.moe.upcycle.assemble import upcycle
from hfedmoe_ray.moe.upcycle.calibrate import LayerInputs, LayerReport
from hfedmoe_ray.moe.upcycle.clusters import balanced_clusters

LAYERS = (1, 3)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> BertModel:
    source = save_bert(tmp_path_factory.mktemp("bert"))
    return BertModel.from_pretrained(source, add_pooling_layer=False).eval()


def build(
    dense: BertModel, seed: int = 0, calibrate: bool = False, **options: object
) -> tuple[MoEEncoderForSequenceClassification, list[LayerReport]]:
    config = Upcycle.model_validate({"layers": LAYERS, "calibration_steps": 60 if calibrate else 0} | options)
    return upcycle(deepcopy(dense), config, 3, seed, [batch(texts=60)])


def embeddings(dense: BertModel, model: MoEEncoderForSequenceClassification) -> tuple[torch.Tensor, torch.Tensor]:
    """Pooled embeddings of the dense model and of its MoE, [B, H]."""
    ids, mask = batch(texts=20)
    with torch.no_grad():
        states = dense(input_ids=ids, attention_mask=mask).last_hidden_state
        real = mask[..., None].float()
        return (states * real).sum(1) / real.sum(1), model.encode(model.prefix(ids, mask), mask)


def test_a_split_that_uses_every_expert_is_the_dense_model(dense: BertModel) -> None:
    """The router is nearly uniform before calibration: within 1 %. With a uniform one: exact."""
    model, _ = build(dense, how="split", experts=6, top_k=6)
    expected, ours = embeddings(dense, model)
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)
    for layer in LAYERS:
        torch.nn.init.zeros_(model.layer[layer].moe.gate.weight)
    torch.testing.assert_close(embeddings(dense, model)[1], expected, rtol=1e-4, atol=1e-5)


def test_a_split_moves_neurons_and_makes_none(dense: BertModel) -> None:
    model, _ = build(dense, how="split", experts=6, top_k=2)
    for layer in LAYERS:
        experts, ffn = model.layer[layer].moe.experts, dense.encoder.layer[layer]
        assert experts.up_proj.shape == (6, 8, 24)
        rows = experts.up_proj.reshape(48, 24)
        original = ffn.intermediate.dense.weight
        place = torch.cdist(rows, original).argmin(dim=1)
        assert torch.equal(place.sort().values, torch.arange(48))
        assert torch.equal(rows, original[place])
        assert torch.equal(experts.up_bias.flatten(), ffn.intermediate.dense.bias[place])
        assert torch.equal(experts.down_proj.transpose(1, 2).reshape(48, 24), ffn.output.dense.weight.T[place])


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_copies_without_noise_are_the_dense_model(dense: BertModel, top_k: int) -> None:
    model, _ = build(dense, how="copy", experts=4, top_k=top_k, noise=0.0)
    expected, ours = embeddings(dense, model)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_noise_makes_copies_differ_by_its_share_of_the_weights(dense: BertModel) -> None:
    model, _ = build(dense, how="copy", experts=4, top_k=2, noise=0.1)
    up, original = (
        model.layer[1].moe.experts.up_proj.detach(),
        dense.encoder.layer[1].intermediate.dense.weight.detach(),
    )
    assert not torch.equal(up[0], up[1])
    assert float((up - original).std() / original.std()) == pytest.approx(0.1, rel=0.1)


def test_calibration_brings_the_moe_closer_to_the_dense_model(dense: BertModel) -> None:
    options = {"how": "split", "experts": 6, "top_k": 2}
    expected, before = embeddings(dense, build(dense, **options)[0])
    model, reports = build(dense, calibrate=True, **options)
    after = embeddings(dense, model)[1]
    assert [report.layer for report in reports] == list(LAYERS)
    assert sum(r.calibrated_error for r in reports) < sum(r.centroid_error for r in reports)
    assert (after - expected).norm() < (before - expected).norm()


def test_upcycling_depends_on_the_seed_and_nothing_else(dense: BertModel) -> None:
    for options in ({"how": "split", "calibrate": True}, {"how": "copy"}):
        built = [build(dense, seed, experts=6, top_k=2, **options)[0].layer[1].moe.state_dict() for seed in (0, 0, 1)]
        assert all(torch.equal(built[0][name], tensor) for name, tensor in built[1].items())
        assert any(not torch.equal(built[0][name], tensor) for name, tensor in built[2].items())


def test_clusters_are_of_equal_size_and_follow_directions() -> None:
    """Three tight bundles of directions, unequal lengths: found whatever the order of the rows."""
    rng = np.random.default_rng(0)
    directions = np.eye(8)[:3]
    rows = np.repeat(directions, 10, axis=0) + 0.05 * rng.standard_normal((30, 8))
    rows = (rows * rng.uniform(0.1, 10.0, (30, 1))).astype(np.float32)
    order = rng.permutation(30)
    labels = balanced_clusters(rows[order], 3, seed=1)
    assert np.bincount(labels).tolist() == [10, 10, 10]
    for bundle in range(3):
        assert len(set(labels[order // 10 == bundle])) == 1


def test_layer_inputs_are_those_of_real_tokens(dense: BertModel) -> None:
    """What hooks on the whole model see, in batches or in one, and the model is left as it was."""
    ids, mask = batch()
    expected: list[torch.Tensor] = []
    handles = [
        layer.intermediate.register_forward_pre_hook(lambda _, args: expected.append(args[0][mask.bool()]))
        for layer in dense.encoder.layer
    ]
    with torch.no_grad():
        dense(input_ids=ids, attention_mask=mask)
    for handle in handles:
        handle.remove()
    inputs = LayerInputs(dense, "encoder.layer", [(ids[:4], mask[:4]), (ids[4:], mask[4:])])
    assert len(dense.encoder.layer) == 4
    for layer, states in zip(dense.encoder.layer, expected, strict=True):
        ours = inputs.advance(layer, "intermediate")
        assert ours.shape == (int(mask.sum()), 24)
        torch.testing.assert_close(ours, states, rtol=1e-5, atol=1e-5)
        assert not layer.intermediate._forward_pre_hooks


def test_dense_layers_and_embeddings_are_taken_over(dense: BertModel, tmp_path: Path) -> None:
    """Also through a file: what is saved and loaded gives the same bits."""
    model, _ = build(dense, how="split", experts=6, top_k=2)
    ids, mask = batch()
    with torch.no_grad():
        lower = dense(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(model.prefix(ids, mask), lower, rtol=1e-5, atol=1e-6)
    torch.nn.init.normal_(model.classifier.weight)
    model.save_pretrained(tmp_path)
    loaded = MoEEncoderForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids, mask).logits, model(ids, mask).logits)
