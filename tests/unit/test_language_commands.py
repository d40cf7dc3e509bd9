"""Language models on the command line: upcycled ones are transformers' own, and what a run trained writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import Hub
from moe_models import WORDS, save_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hfedmoe_ray.cli import main
from hfedmoe_ray.data.tokenize import load_tokenizer, tokenize
from hfedmoe_ray.errors import ConfigError, DataError, ModelError
from hfedmoe_ray.moe.upcycle.specialise import language_loss

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def save_llama(directory: Path, **changes: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=len(WORDS), **SIZES, **changes, bos_token_id=None, eos_token_id=2)
        )
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def test_an_upcycled_model_needs_nothing_but_transformers(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["upcycle", str(llama), "--experts", "3", "--noise", "0", "--out", str(tmp_path / "copies")]) == 0
    assert "2 layers of 3 experts, 2 a token" in capsys.readouterr().out
    dense, moe = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (llama, tmp_path / "copies")
    )
    assert type(moe).__module__.startswith("transformers.")
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        torch.testing.assert_close(moe(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    assert main(["upcycle", str(llama), "--out", str(tmp_path / "copies")]) == ConfigError.exit_code

    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"said": f"word{i % 9} word{i % 5}"}) + "\n" for i in range(20)))
    split = ["--how", "split", "--experts", "4", "--calibrate", str(texts), "--text", "said"]
    assert main(["upcycle", str(llama), *split, "--out", str(tmp_path / "split")]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "split").config.intermediate_size == 8


def test_a_model_of_the_hub_is_upcycled_at_the_revision_that_is_named(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commits = []
    for number in (1, 2):
        directory = save_llama(tmp_path / str(number), initializer_range=0.1 * number)
        commits.append(hub.commit("someone/llama", {one.name: one.read_bytes() for one in directory.iterdir()}))
    for number, revision in enumerate([["--revision", commits[0]], []]):
        out = tmp_path / f"moe-{number}"
        assert main(["upcycle", "someone/llama", *revision, "--experts", "2", "--noise", "0", "--out", str(out)]) == 0
        assert f"of someone/llama at commit {commits[number]}" in capsys.readouterr().out
        dense, moe = (
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            for path in (tmp_path / str(number + 1), out)
        )
        ids = torch.arange(3, 13)[None]
        with torch.no_grad():
            torch.testing.assert_close(moe(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
    here = str(tmp_path / "1")
    assert main(["upcycle", here, "--revision", "main", "--out", str(tmp_path / "moe")]) == ModelError.exit_code


def test_experts_that_learned_a_domain_each_serve_it_better_together(tmp_path: Path) -> None:
    """Two domains of words in a fixed order each, three experts: the routers must find the right ones."""
    llama = save_llama(tmp_path / "llama", initializer_range=0.3)  # else the head hardly tells words apart
    rng = np.random.default_rng(0)
    rows = []
    for number in range(240):
        start, domain = int(rng.integers(7)), number % 2
        words = [f"word{8 * domain + (start + (3 - domain) * step) % 7}" for step in range(8)]
        rows.append({"said": " ".join(words), "topic": ("up", "down")[domain]})
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["upcycle", str(llama), "--experts", "3", "--top-k", "1", "--noise", "0"]
    specialised = [*common, "--specialise", str(texts), "--text", "said", "--by", "topic", "--learning-rate", "0.01"]
    for name, arguments in (
        ("copies", common),
        ("unmoved", [*specialised, "--steps", "0"]),
        ("specialised", [*specialised, "--steps", "40"]),
    ):
        assert main([*arguments, "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "unmoved" / "model.safetensors").read_bytes() == (
        tmp_path / "copies" / "model.safetensors"
    ).read_bytes()
    tokenizer = load_tokenizer(llama)
    losses = {}
    for name, path in (("dense", llama), ("moe", tmp_path / "specialised")):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        assert type(model).__module__.startswith("transformers.")
        for topic in ("up", "down"):
            ids, _ = tokenize(tokenizer, [row["said"] for row in rows if row["topic"] == topic][-40:], 16)
            ids = torch.from_numpy(ids).long()
            with torch.no_grad():
                losses[name, topic] = float(language_loss(model, ids, torch.ones_like(ids)))
    assert all(losses["moe", topic] < losses["dense", topic] - 1 for topic in ("up", "down")), losses

    assert main([*specialised, "--how", "split", "--out", str(tmp_path / "x")]) == ConfigError.exit_code
    assert main([*specialised, "--experts", "2", "--by", "said", "--out", str(tmp_path / "x")]) == DataError.exit_code


def test_a_run_learns_to_write_and_does(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = [{"asked": f"word{i % 4}", "said": f"word{10 + i % 4} word9"} for i in range(120)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = [{"q": f"word{i}", "a": f"word{10 + i}", "b": f"word{10 + (i + 1) % 4}", "label": 0} for i in range(4)]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    asked = {"name": "items", "source": str(tmp_path / "items.jsonl"), "prompt": "q", "choices": ["a", "b"]}
    written = {"name": "written", "kind": "match", "source": asked["source"], "prompt": "q", "answer": "a"}
    written |= {"extract": r"(word\d+) word9", "max_tokens": 6}
    likely = {"name": "likely", "kind": "perplexity", "source": asked["source"], "prompt": "{q} {a} word9"}
    settings = {
        "name": "run",
        "output": str(tmp_path),
        "backend": "local",
        "rounds": 3,
        "strategy": {"name": "hfedmoe", "unselected": "reroute"},
        "clients": {"count": 2, "tiers": [{"name": "all", "share": 1.0, "experts": 0.5}]},
        "model": {
            "source": str(llama),
            "task": "causal",
            "trainable": "full",
            "upcycle": {"how": "copy", "experts": 2, "top_k": 1},
        },
        "data": {"source": str(tmp_path / "data.jsonl"), "prompt": "asked", "response": "said", "max_length": 8},
        "local": {"steps": 30, "batch_size": 16, "profile_examples": 8, "learning_rate": 1e-2},
        "evaluate": {"batch_size": 3, "benchmarks": [asked, written, likely]},
        "tracking": {"wandb": {"mode": "disabled"}},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    assert main(["run", str(tmp_path / "config.yaml")]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "written exact match 0.0 % → 100.0 % (4 items)" in told
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["benchmarks"]
    assert found["written"] == {"before": {"items": 4, "exact_match": 0.0}, "after": {"items": 4, "exact_match": 1.0}}
    before, after = found["likely"]["before"], found["likely"]["after"]
    assert before.keys() == {"items", "word_perplexity", "byte_perplexity", "token_perplexity"}
    # Each word is a token here; the first of a text is predicted too.
    assert before["word_perplexity"] == pytest.approx(before["token_perplexity"])
    assert after["word_perplexity"] != before["word_perplexity"] > 1
    assert after["byte_perplexity"] == pytest.approx(after["word_perplexity"] ** (12 / 72), rel=1e-3)
    answered = found["items"]
    assert answered["before"]["accuracy"] < 1
    assert answered["after"] == {"items": 4, "accuracy": 1.0, "normalised": 1.0}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "now predicts" in page
    assert '<th scope="col">Benchmark</th>' in page
    assert "exact match" in page
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "items 100.0 %, by character 100.0 % (4 items)" in lines
    assert "written exact match 100.0 % (4 items)" in lines
    assert main(["generate", str(tmp_path / "run"), *(f"word{i}" for i in range(4)), "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out.splitlines() == [f"word{10 + i} word9" for i in range(4)]


def test_who_does_not_write_is_told_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["generate", str(tmp_path / "nothing"), "word1"]) == ModelError.exit_code
    assert "package:NAME" in capsys.readouterr().err
