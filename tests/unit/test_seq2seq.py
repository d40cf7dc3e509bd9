"""Models with an encoder that reads a prompt and a decoder that writes the response: Switch Transformers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_models import WORDS, plan, prepare, save_family, task_weights
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hfedmoe_ray.cli import main
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.data.batches import Batch
from hfedmoe_ray.data.choices import Choices, Questions, tokenize_questions
from hfedmoe_ray.data.dataset import Split
from hfedmoe_ray.data.instructions import tokenize_instructions
from hfedmoe_ray.errors import ModelError
from hfedmoe_ray.export import load_exported
from hfedmoe_ray.federation.checkpoint import load_checkpoint, run_identity
from hfedmoe_ray.moe.prepare import initial_weights
from hfedmoe_ray.moe.routing import ProfileAccumulator
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.prepare import prepare_run
from hfedmoe_ray.runtime.federate import federate
from hfedmoe_ray.runtime.local import LocalExecutor
from hfedmoe_ray.train.likelihood import likelihoods
from hfedmoe_ray.types import TaskWeights

TWO_STACKS = {
    "num_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_decoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "expert_capacity": 4,
}
"""One MoE layer in the encoder, one in the decoder; capacities that some texts exceed."""
PROMPTS = ["word2 word3 word4 word5 word3", "word5", "word8 word9 word8 word8 word8 word8 word8"]
RESPONSES = ["word6", "word7 word8 word9 word7 word7", "word10 word11"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def source(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("switch")
    return save_family("switch_transformers", directory, **TWO_STACKS, tie_word_embeddings=request.param)


def pairs(source: Path, prompts: list[str], responses: list[str]) -> Split:
    tokenizer = AutoTokenizer.from_pretrained(source)
    made = tokenize_instructions(tokenizer, prompts, responses, 12, "auto", translates=True)
    labels = np.zeros(len(prompts), np.int64)
    return Split(input_ids=made.input_ids, lengths=made.lengths, prompts=made.prompts, labels=labels, key="pairs")


def forward(model: SparseModel, batch: Batch) -> torch.Tensor:
    assert batch.decoder_ids is not None
    ids, mask, decoder, targets = map(
        torch.from_numpy, (batch.input_ids, batch.attention_mask, batch.decoder_ids, batch.targets)
    )
    return model.forward(ids, mask, targets=targets, decoder=decoder)


def bound(source: Path, cache: Path) -> SparseModel:
    prepared = prepare(source, cache, task="seq2seq")
    model = SparseModel(prepared.path)
    model.bind(plan("FFFFFF", "FFFFFF"), task_weights(prepared), "top")
    return model


def test_the_loss_is_transformers_own(source: Path, tmp_path: Path) -> None:
    model, split = bound(source, tmp_path), pairs(source, PROMPTS, RESPONSES)
    batch = split.batch([0, 1, 2], model.layout.start)
    tokenizer = AutoTokenizer.from_pretrained(source)
    given = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    wanted = tokenizer([f"{response} </s>" for response in RESPONSES], padding=True, return_tensors="pt")
    labels = wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, -100)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = forward(model, batch)
        expected = theirs(input_ids=given["input_ids"], attention_mask=given["attention_mask"], labels=labels).loss
    assert logits.shape == (split.weight([0, 1, 2]), len(WORDS))
    found = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_each_layer_counts_the_tokens_it_reads(source: Path, tmp_path: Path) -> None:
    """The encoder's those of prompts, the decoder's those of responses, whatever is padded beside them."""
    model, split = bound(source, tmp_path), pairs(source, PROMPTS, RESPONSES)
    assert [name.split(".")[0] for name in model.layout.block_names] == ["encoder", "decoder"]
    together, alone = (ProfileAccumulator(model.shape, "max") for _ in range(2))
    with torch.no_grad():
        forward(model, split.batch([0, 1, 2], model.layout.start))
        together.add(model.tape)
        read, written = (len(gates) for gates in model.tape.gate_values())
        for row in range(3):
            forward(model, split.batch([row], model.layout.start))
            alone.add(model.tape)
    assert (read, written) == (int(split.prompts.sum()), int((split.lengths - split.prompts).sum()))
    one, other = together.profile(), alone.profile()
    assert one.tokens == other.tokens == read + written
    np.testing.assert_allclose(one.usage.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(one.usage, other.usage, rtol=1e-5)
    np.testing.assert_allclose(one.kl, other.kl, atol=1e-6)
    np.testing.assert_array_equal(one.routed, other.routed)


def test_choices_are_scored_after_what_the_encoder_read(source: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source)
    choices = (("word3", "word4 word5"), ("word6 word7", "word1"))
    characters = np.array([len(choice) for row in choices for choice in row])
    questions = Questions(prompts=tuple(PROMPTS[:2]), choices=choices, lengths=characters, answers=np.array([0, 1]))
    made = tokenize_questions(tokenizer, questions, 12, translates=True)
    rows = Split(
        input_ids=made["input_ids"], lengths=made["lengths"], labels=made["item"], prompts=made["prompts"], key="q"
    )
    asked = Choices(rows=rows, item=rows.labels, lengths=characters, answers=questions.answers)
    model = bound(source, tmp_path)

    def answered(indices: Any) -> Any:
        batch = rows.batch(indices, model.layout.start)
        return batch, forward(model, batch)

    found = likelihoods(asked, answered, 3, lambda: None)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(source, dtype=torch.float32).eval()
    expected = []
    for prompt, row in zip(PROMPTS, choices, strict=False):
        for choice in row:
            labels = tokenizer(choice, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                loss = theirs(**tokenizer(prompt, return_tensors="pt"), labels=labels).loss
            expected.append(-float(loss) * labels.shape[1])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_other_models_do_not_translate(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="encoder that reads and a decoder that writes"):
        prepare(save_family("mixtral", tmp_path / "mixtral"), tmp_path, task="seq2seq")


@pytest.mark.parametrize("lora", [None, {"rank": 2, "attention": True}], ids=["whole", "factors"])
def test_a_run_learns_exports_and_writes(
    lora: dict[str, Any] | None, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Budgeted clients train both stacks; what is exported is what was trained, by transformers alone."""
    # Prompts and responses are each nearly as long as may be: together beyond `max_length`, which is that of either.
    rows = [{"q": f"word{i % 7} word{i % 5 + 5} " * 6, "a": f"word{i % 7} word{i % 3} " * 5} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = Experiment.model_validate(
        {
            "name": "tiny",
            "backend": "local",
            "rounds": 2,
            "strategy": {"name": "hfedmoe", "tau": 0.5},
            "clients": {
                "count": 2,
                "tiers": [
                    {"name": "phone", "share": 0.5, "experts": 0.34, "device": 0.1, "checkpoint_activations": True},
                    {"name": "server", "share": 0.5, "experts": 1.0, "device": 0.1, "micro_batch": 2},
                ],
            },
            "model": {"source": str(source), "task": "seq2seq", "trainable": "top", "lora": lora},
            "data": {
                "source": str(tmp_path / "rows.jsonl"),
                "prompt": "q",
                "response": "a",
                "max_length": 12,
                "test_examples": 6,
            },
            "local": {"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "profile_examples": 8},
            "tracking": {"wandb": {"mode": "disabled"}},
        }
    )
    run, out = tmp_path / "run", tmp_path / "export"
    summary = federate(
        made, run, resume=False, make_executor=LocalExecutor, render=lambda *_: None, should_stop=lambda: False
    )
    assert summary["clients"]["ok"] == 6  # two clients profile, and train in two rounds
    context = prepare_run(made, run)
    first = initial_weights(context.model, "top", lora=made.model.lora, seed=made.seed)
    weights = load_checkpoint(run / "checkpoints", run_identity(context)).weights
    moved = {
        key.layer
        for key, own in first.experts.items()
        if any((weights.experts[key][name] != array).any() for name, array in own.items())
    }
    assert moved == {0, 1}

    assert main(["export", str(run), "--output", str(out)]) == 0
    model = SparseModel(context.model.path, lora=made.model.lora)
    model.bind(
        plan("FFFFFF", "FFFFFF"),
        TaskWeights(shared=weights.shared, experts=weights.experts, means=weights.means),
        "top",
    )
    batch = pairs(source, PROMPTS, RESPONSES).batch([0, 1, 2], model.layout.start)
    theirs = load_exported(out)
    assert type(theirs).__name__ == "SwitchTransformersForConditionalGeneration"
    names = ("input_ids", "attention_mask", "decoder_ids", "targets")
    ids, mask, decoder, targets = (torch.from_numpy(getattr(batch, name)) for name in names)
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder).logits[targets]
        torch.testing.assert_close(forward(model, batch), expected, rtol=1e-4, atol=1e-5)

    if lora:
        assert main(["export", str(run), "--output", str(tmp_path / "adapter"), "--format", "peft"]) == 0
        base = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter" / "base", dtype=torch.float32)
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        with torch.no_grad():
            found = adapted(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder).logits[targets]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    capsys.readouterr()
    assert main(["generate", str(run), "word3 word5", "--max-tokens", "3"]) == 0
    written = capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(out)
    said = theirs.generate(**tokenizer("word3 word5", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert written.strip() == tokenizer.decode(said[0], skip_special_tokens=True).strip()
