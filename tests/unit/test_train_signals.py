"""What clients measure of each expert, against the definition computed token by token."""

import numpy as np
import pytest
import torch
from moe_models import LABELS, batch, plan, prepare, save_mixtral, task_weights
from torch.nn.functional import cross_entropy

from hfedmoe_ray.data.batches import Batch
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.train.signals import Signals
from hfedmoe_ray.types import ExpertKey

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SparseModel:
    root = tmp_path_factory.mktemp("signals")
    prepared = prepare(save_mixtral(root / "source"), root / "cache")
    bound = SparseModel(prepared.path)
    bound.bind(plan("TTTTTT", "TT.T.T", absent="drop"), task_weights(prepared), "top")
    return bound


def test_accuracy_and_loss_are_weighted_by_routed_tokens(model: SparseModel) -> None:
    signals = Signals({"accuracy", "loss"}, (2, 6))
    right, losses, weights = np.zeros((2, 6)), np.zeros((2, 6)), np.zeros((2, 6))
    for texts in (6, 3):
        ids, mask = batch(texts)
        labels = torch.arange(texts) % LABELS
        logits = model.forward(ids, mask)
        read = Batch(input_ids=ids.numpy(), attention_mask=mask.numpy(), labels=labels.numpy())
        signals.add_examples(model.tape, read, logits, labels)
        owners = [text for text in range(texts) for real in mask[text] if real]
        for layer, index in enumerate(model.tape.index):
            for owner, experts in zip(owners, index.tolist(), strict=True):
                for expert in experts:
                    right[layer, expert] += float(logits[owner].argmax() == labels[owner])
                    losses[layer, expert] += float(cross_entropy(logits[owner], labels[owner]))
                    weights[layer, expert] += 1
    found = signals.result()
    assert list(found) == ["accuracy", "loss"]
    routed = np.maximum(weights, 1)
    np.testing.assert_allclose(found["accuracy"], right / routed, atol=1e-12)
    np.testing.assert_allclose(found["loss"], losses / routed, rtol=1e-5)
    assert (found["loss"] > 0).any()


def test_gradients_are_mean_squared_norms_over_the_steps_that_had_one(model: SparseModel) -> None:
    signals = Signals({"gradient"}, (2, 6))
    norms: dict[ExpertKey, list[float]] = {}
    for texts, active in ((6, [ExpertKey(0, 1), ExpertKey(1, 3)]), (4, [ExpertKey(0, 1)])):
        ids, mask = batch(texts)
        model.module.zero_grad()
        torch.autograd.backward(cross_entropy(model.forward(ids, mask), torch.arange(texts) % LABELS))
        signals.add_gradients(active, model.expert_parameters)
        for key in active:
            flat = torch.cat([p.grad.flatten() for p in model.expert_parameters[key].values()])
            norms.setdefault(key, []).append(float(flat.double().norm() ** 2))
    expected = np.zeros((2, 6))
    for key, values in norms.items():
        expected[key] = np.mean(values)
    np.testing.assert_allclose(signals.result()["gradient"], expected, rtol=1e-6)
    assert (expected > 0).sum() == 2


def test_what_is_not_wanted_is_not_measured(model: SparseModel) -> None:
    ids, mask = batch()
    signals = Signals((), (2, 6))
    signals.add_examples(model.tape, mask, model.forward(ids, mask), torch.zeros(len(ids), dtype=torch.long))
    signals.add_gradients([ExpertKey(0, 0)], model.expert_parameters)
    assert signals.result() == {}
