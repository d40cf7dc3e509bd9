"""One view of all families: experts are read and written, parameters sorted, unknown models refused."""

from pathlib import Path

import pytest
import torch
from moe_models import WORDS, batch, save_mixtral
from transformers import BertConfig, BertModel, MixtralForSequenceClassification, PreTrainedModel

from hfedmoe_ray.errors import ModelError
from hfedmoe_ray.moe.encoder import MoEEncoderConfig, MoEEncoderForSequenceClassification
from hfedmoe_ray.moe.layout import layout_of
from hfedmoe_ray.types import ExpertKey


def encoder() -> PreTrainedModel:
    config = MoEEncoderConfig(
        vocab_size=len(WORDS),
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        moe_layers=[1, 3],
        num_experts=6,
        num_experts_per_tok=2,
        expert_size=8,
        num_labels=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MoEEncoderForSequenceClassification(config).eval()


@pytest.fixture(params=["encoder", "mixtral"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    if request.param == "encoder":
        return encoder()
    return MixtralForSequenceClassification.from_pretrained(save_mixtral(tmp_path)).eval()


def test_sizes(model: PreTrainedModel) -> None:
    layout = layout_of(model)
    assert (layout.layers, layout.num_experts, layout.top_k) == (2, 6, 2)
    assert layout.hidden == model.config.hidden_size
    everything = sum(p.numel() for name, p in model.named_parameters() if layout.groups[name] == "expert")
    assert layout.expert_bytes * 12 == 4 * everything


def test_an_expert_is_written_and_read_back_and_nothing_else_moves(model: PreTrainedModel) -> None:
    layout = layout_of(model)
    before = {key: {n: t.clone() for n, t in layout.read_expert(key).items()} for key in layout.expert_keys()}
    written = ExpertKey(1, 4)
    new = {name: torch.randn(shape) for name, shape in layout.expert_shapes.items()}
    layout.write_expert(written, new)
    for key in layout.expert_keys():
        for name, tensor in layout.read_expert(key).items():
            assert torch.equal(tensor, new[name] if key == written else before[key][name])


def test_the_expert_function_is_the_models_own(model: PreTrainedModel) -> None:
    """Tokens sent to one expert with weight 1 come out of the fused module as out of `expert_forward`."""
    layout = layout_of(model)
    tokens = torch.randn(5, layout.hidden)
    experts = getattr(layout.blocks[1], layout.experts_name)
    for expert in range(layout.num_experts):
        fused = experts(tokens, torch.full((5, 1), expert), torch.ones(5, 1))
        alone = layout.expert_forward(tokens, layout.read_expert(ExpertKey(1, expert)))
        torch.testing.assert_close(fused, alone, rtol=1e-5, atol=1e-6)


def test_the_choice_is_the_routers_own(model: PreTrainedModel) -> None:
    layout = layout_of(model)
    logits, weights, index = layout.router(0)(torch.randn(7, layout.hidden))
    ours, chosen = layout.choose(0, logits, layout.top_k)
    assert torch.equal(index, chosen)
    torch.testing.assert_close(ours, weights)


def test_every_parameter_has_one_group(model: PreTrainedModel) -> None:
    layout = layout_of(model)
    assert list(layout.groups) == [name for name, _ in model.named_parameters()]
    assert {name for name, group in layout.groups.items() if group == "router"} == set(layout.router_layers)
    assert sorted(layout.router_layers.values()) == [0, 1]
    for name, layer in layout.router_layers.items():
        assert model.get_parameter(name).shape[0] == layout.num_experts
        assert name.startswith(layout.block_names[layer])
    assert {"expert", "router", "head", "top", "rest"} == set(layout.groups.values())


def test_top_begins_at_the_first_moe_layer() -> None:
    """Layer 1 is the first MoE layer: the attention of layer 0 and the dense FFN of layer 2 stay frozen."""
    groups = layout_of(encoder()).groups
    assert groups["layer.0.attention.output.LayerNorm.weight"] == "rest"
    assert groups["embeddings.LayerNorm.weight"] == "rest"
    assert groups["layer.1.attention.self.query.weight"] == "top"
    assert groups["layer.1.moe.output_bias"] == "top"
    assert groups["layer.2.intermediate.dense.weight"] == "rest"
    assert groups["layer.2.attention.self.query.weight"] == "top"
    assert groups["layer.2.output.LayerNorm.weight"] == "top"


def test_an_unknown_family_is_refused_by_name() -> None:
    bert = BertModel(
        BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    )
    with pytest.raises(ModelError, match=r"'bert'.*hfedmoe_encoder, mixtral.*docs/adding-a-family\.md"):
        layout_of(bert)


def test_the_encoder_survives_saving(tmp_path: Path) -> None:
    model = encoder()
    model.save_pretrained(tmp_path)
    loaded = MoEEncoderForSequenceClassification.from_pretrained(tmp_path).eval()
    ids, mask = batch()
    assert torch.equal(model(ids, mask).logits, loaded(ids, mask).logits)
    assert [file.name for file in tmp_path.glob("*model*")] == ["model.safetensors"]


def test_the_encoder_wants_tokens_or_states() -> None:
    with pytest.raises(ValueError, match="input_ids or hidden_states"):
        encoder()(attention_mask=torch.ones(1, 3))
