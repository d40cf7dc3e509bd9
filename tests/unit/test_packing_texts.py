"""Several texts in a row are what they are in rows of their own: losses, gradients, routing."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_models import DOCUMENTED, FAMILIES, known_to_the_package, plan, prepare, save_family, task_weights
from torch.nn.functional import cross_entropy

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.data.batches import packed, written_after
from hfedmoe_ray.data.dataset import Split
from hfedmoe_ray.federation.checkpoint import load_checkpoint, run_identity
from hfedmoe_ray.moe.prepare import initial_weights
from hfedmoe_ray.moe.routing import ProfileAccumulator
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.runtime.federate import federate
from hfedmoe_ray.runtime.local import LocalExecutor
from hfedmoe_ray.train.examples import Examples
from hfedmoe_ray.train.likelihood import log_likelihoods
from hfedmoe_ray.types import RoutingProfile, Weights

DECODERS = [family for family in (*FAMILIES, DOCUMENTED) if family != "switch_transformers"]
SLIDING = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss")
LENGTHS = [3, 11, 2, 5, 4, 9, 7, 2]

pytestmark = pytest.mark.usefixtures("one_thread")


def texts(lengths: list[int], packing: bool, room: int = 12) -> Split:
    rng = np.random.default_rng(5)
    sizes = np.array(lengths, dtype=np.int32)
    ids = rng.integers(3, 20, (len(sizes), room), dtype=np.int32) * (np.arange(room) < sizes[:, None])
    prompts = rng.integers(1, sizes).astype(np.int32)
    labels = np.zeros(len(sizes), np.int64)
    return Split(input_ids=ids, lengths=sizes, prompts=prompts, labels=labels, packing=packing, key=str(packing))


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(2, 12), min_size=1, max_size=12), room=st.integers(12, 40))
def test_rows_hold_every_token_once(lengths: list[int], room: int) -> None:
    split = texts(lengths, False)
    ids = split.input_ids.astype(np.int64)
    alone, row = written_after(ids, split.lengths, split.prompts), packed(ids, split.lengths, split.prompts, room)
    assert row.examples == alone.examples == len(lengths)
    assert row.input_ids.shape[1] <= room
    assert len(row.input_ids) <= len(lengths)
    for example in range(len(lengths)):
        own = row.texts == example
        assert len(set(own.nonzero()[0])) == 1, "a text stands in one row"
        np.testing.assert_array_equal(row.input_ids[own], ids[example, : lengths[example]])
        np.testing.assert_array_equal(row.positions[own], np.arange(lengths[example]))
        np.testing.assert_array_equal(row.labels[row.asked == example], alone.labels[alone.asked == example])
        assert (row.owners() == example).sum() == lengths[example]


def measured(
    model: SparseModel, split: Split, indices: list[int]
) -> tuple[np.ndarray, dict[str, torch.Tensor], RoutingProfile]:
    """Log-likelihood of each text, the gradients of the mean loss, and the routing profile."""
    batch, inputs = Examples(split, None).inputs(model, np.array(indices))
    logits = model.module(**inputs).logits
    cross_entropy(logits, torch.from_numpy(batch.labels)).backward()
    seen = ProfileAccumulator(model.shape, "max")
    seen.add(model.tape)
    gradients = {
        str((key, name)): tensor.grad.clone()
        for key, tensors in model.expert_parameters.items()
        for name, tensor in tensors.items()
        if tensor.grad is not None
    }
    return log_likelihoods(batch, logits.detach()), gradients, seen.profile()


@pytest.mark.parametrize(
    ("family", "changes"),
    [(family, {}) for family in DECODERS] + [(family, {"sliding_window": 4}) for family in SLIDING],
)
def test_packed_texts_have_the_losses_and_gradients_of_single_ones(
    family: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """Attention that sees no further than a few tokens, where a family has it, is no exception."""
    if changes and family.startswith("qwen"):
        changes = changes | {"use_sliding_window": True, "max_window_layers": 0}
    with known_to_the_package(family):
        prepared = prepare(save_family(family, tmp_path / family, **changes), tmp_path, task="causal")
        model, found = SparseModel(prepared.path), {}
        for packing in (False, True):
            model.bind(plan("TTTTTT", "TTTTTT"), task_weights(prepared), "top")
            found[packing] = measured(model, texts(LENGTHS, packing), list(range(len(LENGTHS))))
    (alone, gradients, one), (together, others, other) = found[False], found[True]
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-6)
    assert one.tokens == other.tokens == sum(LENGTHS)
    np.testing.assert_array_equal(other.routed, one.routed)
    np.testing.assert_allclose(other.usage, one.usage, rtol=1e-5)
    np.testing.assert_allclose(other.kl, one.kl, atol=1e-6)


def test_texts_in_one_row_would_see_each_other_without_positions(tmp_path: Path) -> None:
    """What the test above would find if packing were naive: it can fail."""
    prepared = prepare(save_family("mixtral", tmp_path / "mixtral"), tmp_path, task="causal")
    model = SparseModel(prepared.path)
    model.bind(plan("FFFFFF", "FFFFFF"), task_weights(prepared), "top")
    batch = texts(LENGTHS, True).batch(range(len(LENGTHS)))
    ids, mask, targets, positions = map(
        torch.from_numpy, (batch.input_ids, batch.attention_mask, batch.targets, batch.positions)
    )
    with torch.no_grad():
        apart = model.forward(ids, mask, targets=targets, positions=positions)
        naive = model.forward(ids, mask, targets=targets)
    assert (apart - naive).abs().max() > 1e-2


def flat(weights: Weights) -> np.ndarray:
    return np.concatenate([array.ravel() for tensors in weights.experts.values() for array in tensors.values()])


def test_a_run_ends_in_the_same_weights(tmp_path: Path) -> None:
    """Packed or not, clients draw the same batches: two rounds end within rounding of each other."""
    source = save_family("olmoe", tmp_path / "olmoe")
    rows = [{"q": " ".join(f"word{(i + j) % 17}" for j in range(1 + i % 6)), "a": f"word{i % 5}"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    weights, accuracies = [], []
    for packing in (False, True):
        made = Experiment.model_validate(
            {
                "name": "tiny",
                "backend": "local",
                "rounds": 2,
                "strategy": {"name": "hfedmoe", "tau": 0.5},
                "clients": {
                    "count": 2,
                    "tiers": [{"name": "all", "share": 1.0, "experts": 1.0, "device": 0.1, "micro_batch": 4}],
                },
                "model": {"source": str(source), "task": "causal"},
                "data": {
                    "source": str(tmp_path / "rows.jsonl"),
                    "prompt": "q",
                    "response": "a",
                    "packing": packing,
                    "max_length": 12,
                },
                "local": {"steps": 2, "batch_size": 8, "learning_rate": 1e-2},
                "tracking": {"wandb": {"mode": "disabled"}},
            }
        )
        run = tmp_path / f"run-{packing}"
        summary = federate(
            made, run, resume=False, make_executor=LocalExecutor, render=lambda *_: None, should_stop=lambda: False
        )
        accuracies.append(summary["accuracy"])
        context = prepare_run(made, run)
        first = flat(initial_weights(context.model, "top"))
        weights.append(flat(load_checkpoint(run / "checkpoints", run_identity(context)).weights))
    # AdamW may magnify a rounding difference in a gradient near 0, so it is the whole way that is compared.
    assert np.linalg.norm(weights[1] - weights[0]) < 0.01 * np.linalg.norm(weights[0] - first)
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.05)


@pytest.mark.parametrize("task", ["classification", "seq2seq"])
def test_what_cannot_be_packed_exactly_is_refused(task: str) -> None:
    written = {} if task == "classification" else {"prompt": "q", "response": "a"}
    with pytest.raises(ValueError, match=r"data\.packing"):
        Experiment.model_validate(
            {
                "name": "x",
                "clients": {"tiers": [{"name": "all", "share": 1.0, "experts": 1.0}]},
                "model": {"source": "x", "task": task},
                "data": {"source": "x", "packing": True} | written,
            }
        )
