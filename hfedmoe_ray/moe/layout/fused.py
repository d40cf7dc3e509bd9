"""Families that keep the experts of a layer in fused tensors with the expert as first dimension.

Legend: E experts, H hidden, F ffn per expert, T tokens, K top-k.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from hfedmoe_ray.moe.encoder import MoEBlock, choose_experts
from hfedmoe_ray.moe.layout.base import MoELayout
from hfedmoe_ray.moe.linear import project
from hfedmoe_ray.types import ExpertKey


class FusedLayout(MoELayout):
    """Reads and writes experts as slices [e] of fused tensors."""

    tensor_names: ClassVar[tuple[str, ...]]
    """Names of the fused tensors, and so of one expert's tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Takes sizes from the first block: transformers' families have the same in every layer."""
        super().__init__(model)
        fused = self._fused(0)
        self._shapes = {name: tuple(tensor.shape[1:]) for name, tensor in fused.items()}
        self.num_experts = next(iter(fused.values())).shape[0]
        self.top_k = int(model.config.num_experts_per_tok)
        self.hidden = int(model.config.hidden_size)
        self.activation = ACT2FN[model.config.hidden_act]

    @property
    def expert_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `MoELayout`."""
        return self._shapes

    def read_expert(self, key: ExpertKey) -> dict[str, Tensor]:
        """See `MoELayout`."""
        return {name: fused[key.expert] for name, fused in self._fused(key.layer).items()}

    def write_expert(self, key: ExpertKey, tensors: Mapping[str, Tensor]) -> None:
        """See `MoELayout`."""
        for name, fused in self._fused(key.layer).items():
            fused[key.expert].copy_(tensors[name])

    def _fused(self, layer: int) -> dict[str, Tensor]:
        experts = getattr(self.blocks[layer], self.experts_name)
        return {name: getattr(experts, name).detach() for name in self.tensor_names}


class MoEEncoderLayout(FusedLayout):
    """Our upcycled BERT: up [F, H] with bias, activation, down [H, F]; an output bias is shared."""

    family = "hfedmoe_encoder"
    block_class = MoEBlock
    head_names = ("classifier",)
    tensor_names = ("up_proj", "up_bias", "down_proj")
    supports_prefix = True

    def expert_forward(self, tokens: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """See `MoELayout`."""
        neurons = self.activation(project(tokens, tensors["up_proj"], tensors["up_bias"]))  # [T, F]
        return project(neurons, tensors["down_proj"])

    def choose(self, _layer: int, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """See `MoELayout`."""
        return choose_experts(logits, top_k, self.model.config.combine)


class GatedLayout(FusedLayout):
    """Gate and up fused [2F, H], gated activation, down [H, F]; softmax over all experts, then the K largest."""

    tensor_names = ("gate_up_proj", "down_proj")

    @property
    def normalises(self) -> bool:
        """Whether a token's K gate weights are scaled to sum to 1."""
        return bool(self.model.config.norm_topk_prob)

    def expert_forward(self, tokens: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """See `MoELayout`."""
        gate, up = project(tokens, tensors["gate_up_proj"]).chunk(2, dim=-1)  # [T, F] each
        return project(self.activation(gate) * up, tensors["down_proj"])

    def choose(self, _layer: int, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """See `MoELayout`."""
        weights, index = torch.topk(torch.softmax(logits.float(), dim=-1), top_k, dim=-1)
        return (weights / weights.sum(dim=-1, keepdim=True) if self.normalises else weights), index


class MixtralLayout(GatedLayout):
    """Mixtral: every layer is MoE."""

    family = "mixtral"
    block_class = MixtralSparseMoeBlock
    normalises = True


class OlmoeLayout(GatedLayout):
    """OLMoE: every layer is MoE."""

    family = "olmoe"
    block_class = OlmoeSparseMoeBlock


class Qwen2MoeLayout(GatedLayout):
    """Qwen2-MoE: beside the routed experts one shared expert with a gate of its own; some layers may be dense."""

    family = "qwen2_moe"
    block_class = Qwen2MoeSparseMoeBlock


class Qwen3MoeLayout(GatedLayout):
    """Qwen3-MoE: some layers may be dense."""

    family = "qwen3_moe"
    block_class = Qwen3MoeSparseMoeBlock
