"""Switch Transformer: one expert a token, a module per expert, and a limit to what an expert takes.

A classifier uses its encoder alone; text to text its decoder too, whose MoE layers then come after the encoder's.

Capacity: in each sequence an expert takes the first `expert_capacity` tokens sent to it; a later one goes to no expert,
and only the residual stream carries it on. That is kept as it is on every client. Under `mean` and `drop` a token is
sent where the full model would send it, so a token beyond the capacity of an absent expert gets no mean output either.
Under `reroute` the capacity counts after re-routing: exactly the model whose router and experts were cut to those
present, which drops more tokens the fewer experts there are. Padding stands after the real tokens of a sequence and
therefore never takes a real token's place.

Legend: B batch, S sequence, T = B*S tokens, H hidden, F ffn, E experts.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, one_hot
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from hfedmoe_ray.errors import ModelError
from hfedmoe_ray.moe.layout.base import MoELayout, Routing
from hfedmoe_ray.moe.linear import project
from hfedmoe_ray.types import ExpertKey


class SwitchLayout(MoELayout):
    """Experts are modules: wi [F, H], activation, wo [H, F]."""

    family = "switch_transformers"
    block_class = SwitchTransformersSparseMLP
    gate_name = "router"
    head_names = ("classifier",)
    top_k = 1

    def __init__(self, model: PreTrainedModel) -> None:
        """Takes sizes from the configuration."""
        super().__init__(model)
        config = model.config
        self.num_experts, self.hidden = int(config.num_experts), int(config.d_model)
        self.activation = ACT2FN[config.dense_act_fn]

    @property
    def expert_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `MoELayout`."""
        config = self.model.config
        return {"wi": (config.d_ff, config.d_model), "wo": (config.d_model, config.d_ff)}

    def read_expert(self, key: ExpertKey) -> dict[str, Tensor]:
        """See `MoELayout`."""
        experts = getattr(self.blocks[key.layer], self.experts_name)
        expert = experts[f"expert_{key.expert}"]
        return {"wi": expert.wi.weight.detach(), "wo": expert.wo.weight.detach()}

    def write_expert(self, key: ExpertKey, tensors: Mapping[str, Tensor]) -> None:
        """See `MoELayout`."""
        for name, tensor in self.read_expert(key).items():
            tensor.copy_(tensors[name])

    def expert_forward(self, tokens: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """See `MoELayout`. Neurons are dropped in training, as in the dense layers of this family."""
        neurons = self.activation(project(tokens, tensors["wi"]))  # [T, F]
        return project(dropout(neurons, self.model.config.dropout_rate, self.model.training), tensors["wo"])

    def choose(self, _layer: int, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """See `MoELayout`; logits are [B, S, E], because capacity is counted in each sequence."""
        if top_k != self.top_k:
            raise ModelError(
                f"Switch Transformer sends each token to one expert, and this client's plan to {top_k}. Choose a "
                "strategy that leaves the top-k as it is (not fft_moe), or another model."
            )
        weights, index = torch.softmax(logits.float(), dim=-1).max(dim=-1, keepdim=True)  # [B, S, 1]
        place = one_hot(index.squeeze(-1), self.num_experts).cumsum(dim=1).gather(-1, index)  # 1 for an expert's first
        beyond = place > self.model.config.expert_capacity
        return weights.reshape(-1, 1), index.masked_fill(beyond, self.num_experts).reshape(-1, 1)

    def read_routing(self, output: Any) -> Routing:
        """See `MoELayout`; the router returns a one-hot dispatch [B, S, E], weights [B, S, 1] and logits."""
        dispatch, weights, logits = output
        index, weights = self.read_dispatch(dispatch.flatten(end_dim=-2), weights.reshape(-1, 1))
        return Routing(logits, weights, index)

    def write_routing(self, routing: Routing) -> Any:
        """See `MoELayout`."""
        dispatch = one_hot(routing.index, self.num_experts + 1)[..., :-1]
        batch = routing.logits.shape[:-1]
        return dispatch.reshape(routing.logits.shape), routing.weights.reshape(*batch, 1), routing.logits

    def read_dispatch(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """See `MoELayout`; a block hands over the dispatch as [T, 1, E] and weights as [T, 1]."""
        dispatch = first.reshape(-1, self.num_experts)
        sent, index = dispatch.max(dim=-1, keepdim=True)  # [T, 1]
        return index.masked_fill(sent == 0, self.num_experts), second
