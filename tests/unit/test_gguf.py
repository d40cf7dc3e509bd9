"""A model out of a GGUF file is the one that transformers reads from it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hfedmoe_ray.config.model import Model, Upcycle
from hfedmoe_ray.errors import ModelError
from hfedmoe_ray.moe.gguf import unpacked
from hfedmoe_ray.moe.shape import read_shape
from hfedmoe_ray.moe.sources import resolve

gguf = pytest.importorskip("gguf", reason="needs the package gguf")
HIDDEN, FFN, HEADS, LAYERS = 32, 64, 4, 2
TOKENS = ["<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "ab", "Ġa"]


def write(path: Path) -> Path:
    """A random llama whose matrices are quantised to 8 bits, with a byte-level tokenizer."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output": (len(TOKENS), HIDDEN)}
    for layer in range(LAYERS):
        names = ("attn_q", "attn_k", "attn_v", "attn_output")
        shapes |= {f"blk.{layer}.{name}": (HIDDEN, HIDDEN) for name in names}
        shapes |= {f"blk.{layer}.{name}": (FFN, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{layer}.ffn_down"] = (HIDDEN, FFN)
        shapes |= {f"blk.{layer}.{name}_norm": (HIDDEN,) for name in ("attn", "ffn")}
    shapes["output_norm"] = (HIDDEN,)
    for name, shape in shapes.items():
        values = (rng.standard_normal(shape) * 0.3 + (len(shape) == 1)).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) == 2 else None
        stored = values if kind is None else gguf.quants.quantize(values, kind)
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_unpacked_once_and_stands_for_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HFEDMOE_CACHE", str(tmp_path / "cache"))
    file = write(tmp_path / "tiny.gguf")
    directory = resolve(str(file), None)
    written = (directory / "model.safetensors").stat().st_mtime_ns
    assert resolve(str(file), None) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == written
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32).eval()
    ours = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    read, expected = (
        AutoTokenizer.from_pretrained(directory),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name),
    )
    assert read("ab a").input_ids == expected("ab a").input_ids
    shape = read_shape(Model(source=str(file), task="causal", upcycle=Upcycle(how="copy", experts=3, top_k=1)))
    assert (shape.layers, shape.experts, shape.hidden) == (LAYERS, 3, HIDDEN)


def test_what_is_no_gguf_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HFEDMOE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not quite")
    with pytest.raises(ModelError, match="cannot be read as a GGUF model"):
        unpacked(tmp_path / "broken.gguf")
    assert not list((tmp_path / "cache" / "gguf").glob("*"))
