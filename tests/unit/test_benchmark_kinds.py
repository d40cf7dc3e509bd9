"""Benchmarks besides multiple choice: what a model writes, and how likely it finds texts."""

import json
import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_models import plan, prepare, save_family, task_weights
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from hfedmoe_ray.config.evaluation import Benchmark
from hfedmoe_ray.data.benchmarks import read_benchmark
from hfedmoe_ray.data.choices import read_questions
from hfedmoe_ray.data.dataset import Split
from hfedmoe_ray.data.exercises import Prompts, is_right, normalised, read_exercises, tokenize_exercises
from hfedmoe_ray.data.passages import Passages, _windows, tokenize_passages
from hfedmoe_ray.data.sources import columns_of
from hfedmoe_ray.errors import ConfigError
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.train.likelihood import surprise
from hfedmoe_ray.train.written import answer_by_writing

GSM8K = {"name": "gsm8k", "kind": "match", "source": "x", "prompt": "question", "answer": "answer"}
STRICT = r"#### (\-?[0-9\.\,]+)"
TWO_STACKS = {
    "num_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_decoder_layers": 2,
    "num_sparse_decoder_layers": 1,
}
DATA = Path(os.environ.get("HFEDMOE_DATA", "../shared/data"))

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("5 * 250 = 1250\n#### 1250", True),
        ("#### 1,250", True),
        ("#### 1250.", True),
        ("#### 1250\n\nQuestion: and?\n#### 7", True),
        ("Question: and?\n#### 1250", False),  # stops before
        ("#### 7\n#### 1250", False),  # the first counts
        ("The answer is 1250.", False),  # nothing to extract
        ("#### $1250", False),
        ("", False),
    ],
)
def test_the_number_after_the_hashes_counts(written: str, right: bool) -> None:
    """As lm-evaluation-harness's strict match of GSM8K has it."""
    benchmark = Benchmark.model_validate(GSM8K | {"extract": STRICT, "until": ["Question:"]})
    answer = normalised("She has 5 * 250 = <<5*250=1250>>1,250 of $ 5.\n#### 1,250")
    assert answer == "1250"
    assert is_right(written, answer, benchmark) == right


def test_a_choice_of_texts_is_compared_whole_without_extraction() -> None:
    benchmark = Benchmark.model_validate(GSM8K)
    assert is_right(" Paris.\n", normalised("paris"), benchmark)
    assert not is_right("Paris, I think", normalised("paris"), benchmark)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 40), most=st.integers(2, 12))
def test_windows_predict_every_token_once(length: int, most: int) -> None:
    ids = list(range(length))
    windows = _windows(ids, most)
    predicted = [token for row, seen in windows for token in row[seen:]]
    assert predicted == ids[1:]
    for number, (row, seen) in enumerate(windows):
        assert seen >= 1
        assert len(row) == most or (number == 0 and len(windows) == 1)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "switch_transformers"])
def test_what_is_written_in_batches_is_what_transformers_writes_alone(family: str, tmp_path: Path) -> None:
    translates = family == "switch_transformers"
    source = save_family(family, tmp_path / family, **(TWO_STACKS if translates else {}))
    auto = AutoModelForSeq2SeqLM if translates else AutoModelForCausalLM
    theirs, tokenizer = auto.from_pretrained(source, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(source)
    prompts = ["word3 word4 word5 word6", "word7", "word8 word1", "word2 word9 word4 word4 word3 word1"]
    rows = []
    for prompt in prompts:
        given_ids = tokenizer(prompt, return_tensors="pt")
        said = theirs.generate(**given_ids, max_new_tokens=5, do_sample=False, eos_token_id=2, pad_token_id=0)
        new = said[0, 0 if translates else given_ids["input_ids"].shape[1] :]
        rows.append({"q": prompt, "a": tokenizer.decode(new, skip_special_tokens=True)})
    rows[1]["a"] += " word0 word0"  # one is wrong
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = Benchmark(
        name="b", kind="match", source=str(tmp_path / "rows.jsonl"), prompt="q", answer="a", max_tokens=5
    )
    exercises = read_exercises(benchmark)
    made = tokenize_exercises(tokenizer, exercises, 12, translates=translates)
    labels = np.arange(len(rows))
    asked = Prompts(
        rows=Split(input_ids=made["input_ids"], lengths=made["lengths"], labels=labels, key="b"),
        answers=tuple(map(str, made["answers"])),
    )
    prepared = prepare(source, tmp_path, task="seq2seq" if translates else "causal")
    model = SparseModel(prepared.path)
    model.bind(plan("FFFFFF", "FFFFFF"), task_weights(prepared), "top")
    polls = []
    found = answer_by_writing(
        model, tokenizer, asked, benchmark, size=3, precision=nullcontext(), poll=lambda: polls.append(1)
    )
    assert found["answered"] == {"exact_match": 3.0}
    assert found["examples"] == 4
    assert polls
    parts = [asked.part(index, 3).answers for index in range(3)]
    assert sum(parts, ()) == asked.answers


def test_perplexity_is_that_of_the_model_by_token_word_and_byte(tmp_path: Path) -> None:
    source = save_family("olmoe", tmp_path / "olmoe")
    tokenizer = AutoTokenizer.from_pretrained(source)
    texts = ("word3 word4 word5 word1", " ".join(f"word{i % 17}" for i in range(20)))
    made = tokenize_passages(tokenizer, texts, 8)
    rows = Split(
        input_ids=made["input_ids"], lengths=made["lengths"], prompts=made["prompts"], labels=made["item"], key="p"
    )
    asked = Passages(rows=rows, item=made["item"], words=made["words"], bytes=made["bytes"])
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

    def forward(indices: Any) -> Any:
        batch = rows.batch(indices)
        ids, mask, targets = map(torch.from_numpy, (batch.input_ids, batch.attention_mask, batch.targets))
        return batch, theirs(input_ids=ids, attention_mask=mask).logits[targets]

    found = surprise(asked, forward, 2, lambda: None)
    nll = 0.0
    for text in texts:
        ids = [2, *tokenizer(text)["input_ids"]]  # this tokenizer's end-of-sequence token begins a text
        for row, seen in _windows(ids, 8):
            with torch.no_grad():
                logs = torch.log_softmax(theirs(torch.tensor([row])).logits[0].double(), dim=-1)
            nll -= sum(float(logs[at - 1, row[at]]) for at in range(seen, len(row)))
    assert found["answered"]["nll"] == pytest.approx(nll, rel=1e-5)
    assert found["answered"]["tokens"] == found["answered"]["words"] == 24
    assert found["answered"]["bytes"] == sum(map(len, texts))
    assert [len(asked.part(index, 2).rows) for index in range(2)] == [1, 3]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"choices": ["a", "b"]}, "choices"),
        ({"kind": "choice"}, "choices"),
        ({"kind": "choice", "choices": ["a"]}, "choices"),
        ({"kind": "perplexity", "extract": "x"}, "extract"),
        ({"extract": "("}, "regular expression"),
    ],
)
def test_keys_that_do_not_fit_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Benchmark.model_validate(GSM8K | changes)


def test_a_chat_needs_a_template(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_family("olmoe", tmp_path / "olmoe"))
    (tmp_path / "rows.jsonl").write_text('{"question": "word1", "answer": "word2"}\n')
    benchmark = Benchmark.model_validate(GSM8K | {"source": str(tmp_path / "rows.jsonl"), "chat": True})
    with pytest.raises(ConfigError, match="chat template"):
        read_benchmark(benchmark).tokenized(tokenizer, 8, translates=False)


@pytest.mark.skipif(not (DATA / "mmlu").is_dir(), reason="MMLU is not there; HFEDMOE_DATA names its directory")
def test_a_subset_of_mmlu_is_multiple_choice(tmp_path: Path) -> None:
    """As the harness asks it: the choices in the prompt, their letters to choose from."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(DATA / "mmlu" / "mmlu.parquet")
    pq.write_table(table.filter(pc.equal(table["subject"], "astronomy")), tmp_path / "astronomy.parquet")
    prompt = "{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer:"
    letters = [f"{{{letter}:.0}}{letter}" for letter in "ABCD"]
    assert columns_of(letters[0]) == ("A",)
    benchmark = Benchmark(
        name="astronomy",
        source=str(tmp_path / "astronomy.parquet"),
        prompt=prompt,
        choices=tuple(letters),
        answer="answer",
    )
    asked = read_questions(benchmark)
    assert len(asked.prompts) == 152  # the official test rows of this subject
    assert set(asked.choices) == {(" A", " B", " C", " D")}
    assert all(text.count("\n") >= 5 and text.endswith("Answer:") for text in asked.prompts)
    assert set(asked.answers.tolist()) == {0, 1, 2, 3}


@pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason="GSM8K is not there; HFEDMOE_DATA names its directory")
def test_every_answer_of_gsm8k_is_right_by_itself() -> None:
    source = str(DATA / "gsm8k" / "gsm8k.parquet")
    benchmark = Benchmark.model_validate(GSM8K | {"source": source, "extract": STRICT})
    asked = read_exercises(benchmark)
    assert len(asked.answers) == 1319
    assert all(answer.lstrip("-").replace(".", "").isdecimal() for answer in asked.answers)
    raw = read_exercises(benchmark.model_copy(update={"prompt": "answer"}))
    assert all(is_right(text, answer, benchmark) for text, answer in zip(raw.prompts, raw.answers, strict=True))
