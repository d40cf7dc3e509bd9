"""Upcycling a Llama or Mistral to the Mixtral layout keeps it, exactly where it can, or is refused."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_models import LABELS, TEXTS, WORDS, batch, save_tokenizer
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForSequenceClassification,
    MixtralConfig,
    MixtralForSequenceClassification,
    PreTrainedModel,
)

from hfedmoe_ray.config.model import Model, Upcycle
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import ConfigError, HFedMoEError, ModelError
from hfedmoe_ray.moe.prepare import initial_weights, prepare_model, save_full
from hfedmoe_ray.moe.shape import read_shape
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.moe.upcycle.assemble import upcycle
from hfedmoe_ray.moe.upcycle.calibrate import LayerReport
from hfedmoe_ray.moe.upcycle.target import upcycled_config
from hfedmoe_ray.records import RoundReport
from hfedmoe_ray.runtime.federate import federate
from hfedmoe_ray.runtime.local import LocalExecutor
from hfedmoe_ray.types import ExpertKey, Weights

SIZES: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.05,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def save_llama(directory: Path, **changes: Any) -> Path:
    """A causal language model with heads of their own size, scaled rotations and tied embeddings, like SmolLM2."""
    config = LlamaConfig(**SIZES, head_dim=8, rope_parameters=ROPE, tie_word_embeddings=True, rms_norm_eps=1e-4)
    return _save(LlamaForCausalLM, config, directory, changes)


def save_mistral(directory: Path, **changes: Any) -> Path:
    """A classifier whose attention sees four tokens back."""
    return _save(MistralForSequenceClassification, MistralConfig(**SIZES, sliding_window=4), directory, changes)


def _save(model_class: Any, config: Any, directory: Path, changes: dict[str, Any]) -> Path:
    config.update(changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.normal_(parameter, mean=1.0, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


SAVE = {"llama": save_llama, "mistral": save_mistral}


@pytest.fixture(scope="module", params=["llama", "mistral"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SAVE[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def dense(source: Path) -> PreTrainedModel:
    return AutoModel.from_pretrained(source).eval()


def build(
    dense: PreTrainedModel, seed: int = 0, calibrate: bool = False, **options: object
) -> tuple[MixtralForSequenceClassification, list[LayerReport]]:
    config = Upcycle.model_validate({"calibration_steps": 100 if calibrate else 0} | options)
    return upcycle(deepcopy(dense), config, 3, seed, [batch(texts=200)])


def states(dense: PreTrainedModel, model: MixtralForSequenceClassification) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states of the dense model and of its MoE at the real tokens, [N, H]."""
    ids, mask = batch(texts=20)
    with torch.no_grad():
        dense_states, ours = (base(ids, attention_mask=mask).last_hidden_state for base in (dense, model.model))
    return dense_states[mask.bool()], ours[mask.bool()]


def section(source: Path, **upcycling: Any) -> Model:
    options = {"how": "split", "experts": 6, "top_k": 2, "calibration_steps": 20} | upcycling
    return Model.model_validate({"source": str(source), "upcycle": options})


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_copies_without_noise_are_the_dense_model(dense: PreTrainedModel, top_k: int) -> None:
    model, _ = build(dense, how="copy", experts=4, top_k=top_k, noise=0.0)
    expected, ours = states(dense, model)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_split_that_uses_every_expert_is_the_dense_model(dense: PreTrainedModel) -> None:
    """The router is nearly uniform before calibration: within 1 %. With a uniform one: exact."""
    model, _ = build(dense, how="split", experts=6, top_k=6)
    expected, ours = states(dense, model)
    torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)
    for layer in model.model.layers:
        nn.init.zeros_(layer.mlp.gate.weight)
    torch.testing.assert_close(states(dense, model)[1], expected, rtol=1e-4, atol=1e-5)


def test_a_split_moves_neurons_and_makes_none(dense: PreTrainedModel) -> None:
    """Every neuron is in one of six experts of eight; the top-k's weight of 1/2 each is folded into its output."""
    model, _ = build(dense, how="split", experts=6, top_k=2)
    for layer, original in zip(model.model.layers, dense.layers, strict=True):
        experts, mlp = layer.mlp.experts, original.mlp
        assert experts.gate_up_proj.shape == (6, 16, 24)
        gate, up = (half.reshape(48, 24) for half in experts.gate_up_proj.chunk(2, dim=1))
        place = torch.cdist(gate, mlp.gate_proj.weight).argmin(dim=1)
        assert torch.equal(place.sort().values, torch.arange(48))
        assert torch.equal(gate, mlp.gate_proj.weight[place])
        assert torch.equal(up, mlp.up_proj.weight[place])
        assert torch.equal(experts.down_proj.transpose(1, 2).reshape(48, 24), 2 * mlp.down_proj.weight.T[place])


def test_noise_is_a_share_of_each_matrix(dense: PreTrainedModel) -> None:
    model, _ = build(dense, how="copy", experts=4, top_k=2, noise=0.1)
    experts, mlp = model.model.layers[1].mlp.experts, dense.layers[1].mlp
    gate, up = experts.gate_up_proj.detach().chunk(2, dim=1)
    assert not torch.equal(gate[0], gate[1])
    for ours, original in ((gate, mlp.gate_proj), (up, mlp.up_proj), (experts.down_proj.detach(), mlp.down_proj)):
        weight = original.weight.detach()
        assert float((ours - weight).std() / weight.std()) == pytest.approx(0.1, rel=0.1)


def test_calibration_brings_the_moe_closer_to_the_dense_model(dense: PreTrainedModel) -> None:
    options = {"how": "split", "experts": 6, "top_k": 2}
    expected, before = states(dense, build(dense, **options)[0])
    model, reports = build(dense, calibrate=True, **options)
    after = states(dense, model)[1]
    assert [report.layer for report in reports] == [0, 1, 2]
    for report in reports:
        assert report.best_error < report.calibrated_error < report.centroid_error
    assert (after - expected).norm() < (before - expected).norm()


def test_upcycling_depends_on_the_seed_and_nothing_else(dense: PreTrainedModel) -> None:
    for options in ({"how": "split", "calibrate": True}, {"how": "copy"}):
        built = [build(dense, seed, experts=6, top_k=2, **options)[0].model.state_dict() for seed in (0, 0, 1)]
        assert all(torch.equal(built[0][name], tensor) for name, tensor in built[1].items())
        assert any(not torch.equal(built[0][name], tensor) for name, tensor in built[2].items())


def test_the_dense_tensors_are_moved_not_copied(dense: PreTrainedModel) -> None:
    """And a FFN is let go once its experts are written."""
    used_up = deepcopy(dense)
    embeddings, query = used_up.embed_tokens.weight.data_ptr(), used_up.layers[1].self_attn.q_proj.weight.data_ptr()
    model, _ = upcycle(used_up, Upcycle(how="copy", experts=2, top_k=1), 3, 0, ())
    assert model.model.embed_tokens.weight.data_ptr() == embeddings
    assert model.model.layers[1].self_attn.q_proj.weight.data_ptr() == query
    assert all(parameter.is_meta for parameter in used_up.layers.parameters())


@pytest.mark.parametrize("family", [LlamaConfig, MistralConfig])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_dim": 16, "rope_theta": 1e5, "num_key_value_heads": 4},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "tie_word_embeddings": True, "torch_dtype": "bfloat16"},
        {"quantization_config": {"quant_method": "gguf"}, "attention_dropout": 0.1, "sliding_window": None},
    ],
)
def test_the_mixtral_configuration_says_what_the_dense_one_meant(family: Any, changes: dict[str, Any]) -> None:
    """Whatever a config.json leaves out, and in the old and new way of writing it."""
    sizes = {name: getattr(family(), name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    sizes |= {name: getattr(family(), name) for name in ("num_hidden_layers", "num_attention_heads")}
    written = {"model_type": family.model_type, **sizes, **deepcopy(changes)}
    target = upcycled_config(written, Upcycle(how="split", experts=4, top_k=2))
    assert json.loads(json.dumps(target)) == target
    ours = MixtralConfig(**{name: value for name, value in target.items() if name != "model_type"})
    theirs = family(**deepcopy({name: value for name, value in written.items() if name != "quantization_config"}))
    assert ours.intermediate_size == theirs.intermediate_size // 4
    assert (ours.num_local_experts, ours.num_experts_per_tok) == (4, 2)
    assert (ours.dtype, ours.attention_dropout) == (torch.float32, 0.0)
    assert not hasattr(ours, "quantization_config")
    assert ours.sliding_window == (theirs.sliding_window if family is MistralConfig else None)
    kept = ("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range")
    kept += ("rms_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "rope_parameters")
    assert {name: getattr(ours, name) for name in kept} == {name: getattr(theirs, name) for name in kept}


@pytest.mark.parametrize("trainable", ["experts", "top", "full"])
@pytest.mark.parametrize("how", ["split", "copy"])
def test_the_shape_is_known_before_anything_is_loaded(source: Path, tmp_path: Path, how: str, trainable: str) -> None:
    model = section(source, how=how).model_copy(update={"trainable": trainable})
    prepared = prepare_model(model, LABELS, 0, TEXTS, tmp_path)
    sparse = SparseModel(prepared.path)
    sizes = {name: parameter.numel() for name, parameter in sparse.module.named_parameters()}
    assert read_shape(model, LABELS) == prepared.shape == sparse.layout.shape(model.trainable, sizes)
    assert (prepared.shape.layers, prepared.shape.experts, prepared.shape.top_k) == (3, 6, 2)


def test_it_is_saved_for_transformers_alone(source: Path, dense: PreTrainedModel, tmp_path: Path) -> None:
    """Read back by its Auto class, it is the dense model with the prepared head."""
    prepared = prepare_model(section(source, how="copy", noise=0.0), LABELS, 0, [], tmp_path / "cache")
    weights = initial_weights(prepared, "experts")
    save_full(prepared, Weights(version=0, shared=weights.shared, experts=weights.experts), tmp_path / "export")
    model, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert type(model.eval()) is MixtralForSequenceClassification
    assert not any(report.values())
    np.testing.assert_array_equal(model.score.weight.detach().numpy(), weights.shared["score.weight"])
    expected, ours = states(dense, model)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "export").pad_token == "[PAD]"


def test_half_precision_weights_and_a_trace_of_quantisation(tmp_path: Path) -> None:
    """A model in bfloat16 that was quantised once gives fp32 experts, also through the export's empty shell."""
    source = save_llama(tmp_path / "source")
    LlamaForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    prepared = prepare_model(section(source), LABELS, 0, [], tmp_path / "cache")
    weights = initial_weights(prepared, "top")
    key = ExpertKey(2, 1)
    trained = {name: array + np.float32(1e-5) for name, array in weights.experts[key].items()}
    save_full(prepared, Weights(version=1, shared=weights.shared, experts={key: trained}), tmp_path / "export")
    model = MixtralForSequenceClassification.from_pretrained(tmp_path / "export")
    np.testing.assert_array_equal(model.model.layers[2].mlp.experts.down_proj[1].detach().numpy(), trained["down_proj"])
    assert "quantization_config" not in json.loads((tmp_path / "export" / "config.json").read_text())


def _quantised(root: Path) -> Model:
    from safetensors.torch import load_file, save_file

    source = save_llama(root)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return section(source)


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (lambda root: section(save_llama(root), layers=[1, 2]), ConfigError, "every layer .* Remove `layers`"),
        (lambda root: section(save_mistral(root), layers=[3]), ConfigError, "a mistral becomes a Mixtral"),
        (lambda root: section(save_llama(root), experts=7), ConfigError, "7 equal experts. Choose one of 2, 3, 4"),
        (lambda root: section(save_llama(root, attention_bias=True)), ModelError, "biases .attention_bias in"),
        (lambda root: section(save_llama(root, mlp_bias=True)), ModelError, "biases .mlp_bias in"),
        (lambda root: Model(source=str(save_llama(root))), ModelError, "upcycle is missing"),
        (_quantised, ModelError, r"quantised \(I8\)"),
    ],
)
def test_what_would_not_be_the_same_model_is_refused(
    tmp_path: Path, model: Any, error: type[HFedMoEError], message: str
) -> None:
    made = model(tmp_path / "source")
    with pytest.raises(error, match=message) as caught:
        prepare_model(made, LABELS, 0, [], tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    if "quantised" not in message:  # everything else is known from the configuration alone
        with pytest.raises(error, match=message):
            read_shape(made)


def test_all_layers_may_be_named(source: Path) -> None:
    assert read_shape(section(source, layers=[2, 0, 1])) == read_shape(section(source))


def test_it_learns_in_a_federation(tmp_path: Path) -> None:
    """Two rounds of three clients, most of which hold a third of the experts; every class has words of its own."""
    rows = [
        {"text": " ".join(f"word{3 * ((i + j * j) % 5) + i % 3}" for j in range(3 + i % 7)), "label": f"class {i % 3}"}
        for i in range(150)
    ]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiers = [
        {"name": "phone", "share": 0.67, "experts": 0.34, "device": 0.1},
        {"name": "server", "share": 0.33, "experts": 0.67, "device": 0.1},
    ]
    experiment = Experiment.model_validate(
        {
            "name": "tiny",
            "backend": "local",
            "rounds": 2,
            "clients": {"count": 3, "tiers": tiers},
            "model": section(save_llama(tmp_path / "source")),
            "data": {"source": str(tmp_path / "texts.jsonl"), "max_length": 12, "test_examples": 30},
            "local": {"steps": 8, "batch_size": 8, "learning_rate": 1e-2, "profile_examples": 8},
            "tracking": {"wandb": {"mode": "disabled"}},
        }
    )
    rounds: list[RoundReport] = []
    summary = federate(
        experiment,
        tmp_path / "run",
        resume=False,
        make_executor=LocalExecutor,
        render=lambda name, value: rounds.append(value) if name == "round" else None,
        should_stop=lambda: False,
    )
    assert summary["clients"] == {"ok": 9, "late": 0, "failed": 0, "memory": 0, "rejected": 0, "dropped": 0}
    start, _, end = rounds
    assert start.accuracy is not None
    assert end.accuracy is not None
    assert end.accuracy > start.accuracy + 0.2
