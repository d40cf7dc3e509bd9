"""Language models that learn to write responses: what counts, what is left out, and what transformers makes of it."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_models import FAMILIES, WORDS, plan, prepare, save_family, save_tokenizer, task_weights
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hfedmoe_ray.config.data import Data
from hfedmoe_ray.config.evaluation import Benchmark
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.data.choices import Choices, Questions, read_questions, stored_choices, tokenize_questions
from hfedmoe_ray.data.dataset import FederatedDataset, Split
from hfedmoe_ray.data.instructions import tokenize_instructions
from hfedmoe_ray.data.prepare import prepare_data
from hfedmoe_ray.data.sources import columns_of, load_raw
from hfedmoe_ray.errors import ConfigError, DataError, ModelError
from hfedmoe_ray.moe.prepare import initial_weights, save_full
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.train.likelihood import answer

DECODERS = [family for family in FAMILIES if family != "switch_transformers"]
CHAT = (
    "{% for m in messages %}{{ 'word0 ' if m.role == 'user' else 'word1 ' }}{{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}word1 {% endif %}"
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(directory)
    return AutoTokenizer.from_pretrained(directory)


def split_of(
    tokenizer: Any, prompts: list[str], responses: list[str], length: int = 20, template: Any = "auto"
) -> Split:
    made = tokenize_instructions(tokenizer, prompts, responses, length, template)
    labels = np.zeros(len(prompts), np.int64)
    return Split(input_ids=made.input_ids, lengths=made.lengths, prompts=made.prompts, labels=labels, key="tokens")


PROMPTS = ["word2 word3 word4", "word5", ""]
RESPONSES = ["word6", "word7 word8 word9", "word10 word11"]


# ---------------------------------------------------------------------------------------------- what is to be written


@pytest.mark.parametrize("chat", [False, True])
def test_exactly_the_response_and_its_end_are_asked_for(tokenizer: Any, chat: bool) -> None:
    tokenizer = deepcopy(tokenizer)
    tokenizer.chat_template = CHAT if chat else None
    split = split_of(tokenizer, PROMPTS[:2], RESPONSES[:2])
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES[:2], strict=False)):
        batch = split.batch([row])
        assert tokenizer.decode(batch.labels).split() == [*response.split(), "</s>"]
        assert split.weight([row]) == len(batch.labels)
        # What the model sees before the first of them is the prompt, in its turn where there are turns.
        given = tokenizer.decode(batch.input_ids[0, : int(np.argmax(batch.targets[0])) + 1]).split()
        assert given == (["word0", *prompt.split(), "</s>", "word1"] if chat else prompt.split())
    both = split.batch([0, 1])
    assert len(both.labels) == split.weight([0, 1]) == split.weight([0]) + split.weight([1])


def test_plain_text_is_written_but_for_its_first_token(tokenizer: Any) -> None:
    batch = split_of(tokenizer, ["", ""], ["word3 word4", "word5"]).batch([0, 1])
    assert tokenizer.decode(batch.labels).split() == ["word4", "</s>", "</s>"]


def test_what_is_too_long_loses_the_start_of_its_prompt_first(tokenizer: Any) -> None:
    made = tokenize_instructions(tokenizer, [" ".join(WORDS[3:13])], ["word1 word2"], 6, "plain")
    assert tokenizer.decode(made.input_ids[0]).split() == ["word7", "word8", "word9", "word1", "word2", "</s>"]
    assert (made.prompts.tolist(), made.cut) == ([3], 1)
    made = tokenize_instructions(tokenizer, ["word1"], [" ".join(WORDS[3:13])], 4, "plain")
    assert (made.prompts.tolist(), made.lengths.tolist(), made.cut) == ([1], [4], 1)


def test_a_chat_template_that_is_not_there_is_told(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="template: plain"):
        tokenize_instructions(tokenizer, ["word1"], ["word2"], 8, "chat")


def test_columns_and_patterns_of_columns(tmp_path: Path) -> None:
    rows = [{"q": f"word{i}", "a": f"word{i + 1}", "n": i % 3} for i in range(12)]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    raw = load_raw(Data(source=str(source), prompt="Q: {q} {n}\nA:", response="a", label="n"))
    every = dict(zip((*raw.train_prompts, *raw.test_prompts), (*raw.train_texts, *raw.test_texts), strict=True))
    assert every == {f"Q: {row['q']} {row['n']}\nA:": row["a"] for row in rows}
    assert raw.label_names == ("0", "1", "2")
    assert load_raw(Data(source=str(source), response="a")).label_names == ("all",)
    with pytest.raises(DataError, match="nothing"):
        load_raw(Data(source=str(source), prompt="{nothing}", response="a"))
    with pytest.raises(DataError, match="label"):
        load_raw(Data(source=str(source), response="a", partition={"how": "dirichlet"}))
    with pytest.raises(DataError, match="no pattern"):
        columns_of("{q")


@pytest.mark.parametrize("own_files", [False, True])
def test_each_client_has_a_task_of_its_own(own_files: bool, tokenizer: Any, tmp_path: Path) -> None:
    """By a column of one file, or by a file of each client's."""
    rows = [{"task": f"task {i % 3}", "q": f"word{i % 3} word9", "a": f"word{i % 3 + 5}"} for i in range(36)]
    for client in range(3):
        own = "".join(json.dumps(row) + "\n" for row in rows[client::3])
        (tmp_path / f"client-{client}.jsonl").write_text(own)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name, partition = (
        ("client-{client}.jsonl", {"how": "files"}) if own_files else ("rows.jsonl", {"how": "natural", "key": "task"})
    )
    data = Data(source=str(tmp_path / name), prompt="q", response="a", partition=partition)
    save_tokenizer(tmp_path / "tokenizer")
    prepared = prepare_data(
        data, load_raw(data), tokenizer_dir=tmp_path / "tokenizer", clients=3, seed=0, cache=tmp_path / "cache"
    )
    dataset = FederatedDataset(prepared, data)
    tasks = set()
    for client in range(3):
        for split in (dataset.train(client), dataset.own_test(client)):
            assert len(split) > 0
            batch = split.batch(range(len(split)))
            (task,) = {tokenizer.decode(row).split()[0] for row in batch.input_ids}
            answers = {word for word in tokenizer.decode(batch.labels).split() if word != "</s>"}
            assert answers == {f"word{int(task.removeprefix('word')) + 5}"}
            tasks.add(task)
    assert tasks == {"word0", "word1", "word2"}


@pytest.mark.parametrize(
    ("model", "data", "told"),
    [
        ({"task": "causal"}, {}, "data.response"),
        ({}, {"response": "a"}, "model.task"),
        ({}, {"prompt": "q"}, "response"),
        ({"task": "causal", "head": "prototypes"}, {"response": "a"}, "head"),
        ({"task": "causal"}, {"response": "a", "template": "chat"}, "prompt"),
    ],
)
def test_halves_of_a_task_are_refused(model: dict[str, Any], data: dict[str, Any], told: str) -> None:
    tiers = [{"name": "all", "share": 1.0, "experts": 1.0}]
    settings = {"name": "x", "clients": {"tiers": tiers}, "model": {"source": "x"} | model}
    with pytest.raises(ValueError, match=told):
        Experiment.model_validate(settings | {"data": {"source": "x"} | data})


def test_an_encoder_is_not_asked_to_write(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="only reads"):
        prepare(save_family("switch_transformers", tmp_path / "switch"), tmp_path, task="causal")


# ---------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("family", DECODERS)
def test_the_loss_is_transformers_own_over_the_responses(family: str, tokenizer: Any, tmp_path: Path) -> None:
    source = save_family(family, tmp_path / family)
    prepared = prepare(source, tmp_path, task="causal")
    ours = SparseModel(prepared.path)
    ours.bind(plan("FFFFFF", "FFFFFF"), task_weights(prepared), "top")
    batch = split_of(tokenizer, PROMPTS, RESPONSES).batch([0, 1, 2])
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
    with torch.no_grad():
        logits = ours.forward(ids, mask, targets=torch.from_numpy(batch.targets))
        assert logits.shape == (len(batch.labels), len(WORDS))
        places = np.roll(batch.targets, 1, axis=1)  # of the tokens themselves
        labels = torch.from_numpy(np.where(places, batch.input_ids, -100))
        theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        expected = theirs(input_ids=ids, attention_mask=mask, labels=labels, output_router_logits=False).loss
        found = torch.nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_copies_write_what_the_dense_model_does_also_once_exported(tied: bool, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(WORDS), **sizes, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=2
        )
        dense = LlamaForCausalLM(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    save_tokenizer(tmp_path / "dense")
    upcycle = {"how": "copy", "experts": 3, "top_k": 2, "noise": 0.0}
    prepared = prepare(tmp_path / "dense", tmp_path, task="causal", upcycle=upcycle, trainable="experts")
    save_full(prepared, initial_weights(prepared, "experts"), tmp_path / "moe")
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype=torch.float32).eval()
        assert type(moe).__name__ == "MixtralForCausalLM"
        torch.testing.assert_close(moe(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- benchmarks


ITEMS = [
    {"goal": f"word{i} word{i + 1}", "one": f"word{i + 2}", "two": f"word{i + 5} word{i + 3}", "label": i % 2}
    for i in range(9)
]


def benchmark(tmp_path: Path, **changes: Any) -> Benchmark:
    source = tmp_path / "items.jsonl"
    source.write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    settings = {"name": "items", "source": str(source), "prompt": "goal", "choices": ["one", "two"]} | changes
    return Benchmark.model_validate(settings)


def test_answers_are_the_likeliest_choices_whatever_the_batches_and_parts(tokenizer: Any, tmp_path: Path) -> None:
    source = save_family("mixtral", tmp_path / "mixtral")
    data = Data(source=str(tmp_path / "items.jsonl"), prompt="goal", response="one", partition={"min_examples": 1})
    asked = benchmark(tmp_path)
    prepared = prepare_data(
        data, load_raw(data), tokenizer_dir=source, clients=2, seed=0, cache=tmp_path, benchmarks=[asked]
    )
    choices = stored_choices(FederatedDataset(prepared, data), "items")
    assert len(choices) == len(ITEMS)

    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    plain = normalised = 0
    for item in ITEMS:
        scores = []
        for choice in (item["one"], item["two"]):
            before, whole = (tokenizer(text)["input_ids"] for text in (item["goal"], f"{item['goal']} {choice}"))
            with torch.no_grad():
                logs = torch.log_softmax(theirs(torch.tensor([whole])).logits[0].double(), dim=-1)
            scores.append(sum(float(logs[at - 1, whole[at]]) for at in range(len(before), len(whole))))
        plain += int(np.argmax(scores)) == item["label"]
        normalised += (
            int(np.argmax([s / len(item[c]) for s, c in zip(scores, ("one", "two"), strict=True)])) == item["label"]
        )

    ours = SparseModel(prepare(source, tmp_path, task="causal").path)
    moe = prepare(source, tmp_path, task="causal")
    ours.bind(plan("FFFFFF", "FFFFFF"), task_weights(moe), "top")

    def answered(part: Choices, size: int) -> tuple[int, int, int]:
        def forward(rows: Any) -> Any:
            batch = part.rows.batch(rows)
            asked = [torch.from_numpy(array) for array in (batch.input_ids, batch.attention_mask, batch.targets)]
            return batch, ours.forward(asked[0], asked[1], targets=asked[2])

        found = answer(part, forward, size, lambda: None)
        return int(found["answered"]["accuracy"]), int(found["answered"]["normalised"]), int(found["examples"])

    assert answered(choices, 5) == (plain, normalised, len(ITEMS))
    parts = [answered(choices.part(index, 4), 3) for index in range(4)]
    assert tuple(map(sum, zip(*parts, strict=True))) == (plain, normalised, len(ITEMS))


def test_a_benchmark_that_cannot_be_read_is_told(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no number of one of the 2 choices"):
        read_questions(benchmark(tmp_path, answer="goal"))
    assert len(read_questions(benchmark(tmp_path, examples=4)).prompts) == 4
    nothing = Questions(prompts=("word1",), choices=(("word2", ""),), lengths=np.array([5, 0]), answers=np.array([0]))
    with pytest.raises(DataError, match="no token of its own"):
        tokenize_questions(tokenizer, nothing, 20)
    with pytest.raises(DataError, match="max_length"):
        tokenize_questions(tokenizer, read_questions(benchmark(tmp_path)), 2)
