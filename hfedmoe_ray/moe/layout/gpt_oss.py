"""GPT-OSS: matrices stored as [in, out], biases everywhere, a clamped activation, softmax over the chosen experts only.

Legend: H hidden, F ffn per expert, T tokens, E experts, K top-k.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from hfedmoe_ray.moe.layout.fused import FusedLayout
from hfedmoe_ray.moe.linear import project

_ALPHA = 1.702
"""The only value there is: transformers' configuration names it since 5.20 or so."""


class GptOssLayout(FusedLayout):
    """Gate and up interleaved [H, 2F] with bias, down [F, H] with bias."""

    family = "gpt_oss"
    block_class = GptOssMLP
    gate_name = "router"
    tensor_names = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    transposed = True

    def expert_forward(self, tokens: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """See `MoELayout`."""
        config = self.model.config
        gate_up = project(tokens, tensors["gate_up_proj"], tensors["gate_up_proj_bias"], transposed=True)
        gate = gate_up[..., ::2].clamp(max=config.swiglu_limit)  # [T, F]
        up = gate_up[..., 1::2].clamp(-config.swiglu_limit, config.swiglu_limit)
        neurons = (up + 1) * gate * torch.sigmoid(gate * getattr(config, "swiglu_alpha", _ALPHA))
        return project(neurons, tensors["down_proj"], tensors["down_proj_bias"], transposed=True)

    def apart(self, positions: Tensor) -> dict[str, Any]:
        """See `MoELayout`. This family makes its masks without the positions, but takes masks that are made."""
        config = self.model.config
        shape_and_type = torch.empty(*positions.shape, 1, dtype=self.model.dtype, device=positions.device)
        arguments = {
            "config": config,
            "inputs_embeds": shape_and_type,
            "attention_mask": None,
            "past_key_values": None,
            "position_ids": positions,
        }
        masks = {
            "full_attention": create_causal_mask(**arguments),
            "sliding_attention": create_sliding_window_causal_mask(**arguments),
        }
        return {"position_ids": positions, "attention_mask": masks}

    def choose(self, _layer: int, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """See `MoELayout`."""
        largest, index = torch.topk(logits, top_k, dim=-1)
        return torch.softmax(largest, dim=-1), index
