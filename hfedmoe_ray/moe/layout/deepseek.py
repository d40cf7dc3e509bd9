"""DeepSeek-V2 and V3: shared experts beside the routed ones, dense lower layers, routing limited to groups.

The E experts of a layer are G groups of E/G neighbours (one group per device, when these models were made). A token may
only use experts of its best groups. Where experts are absent, a group is worth what its present experts are, and a
group without any is never chosen; groups chosen may then hold fewer than K experts, and the token goes to fewer.

Legend: E experts, G groups, T tokens, K top-k.
"""

import torch
from torch import Tensor
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from hfedmoe_ray.moe.layout.fused import GatedLayout

_NOT_THERE = float("-inf")


class DeepseekV2Layout(GatedLayout):
    """DeepSeek-V2: softmax over all experts; a group is worth its best expert."""

    family = "deepseek_v2"
    block_class = DeepseekV2Moe

    def choose(self, _layer: int, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """See `MoELayout`."""
        scores = torch.softmax(logits.float(), dim=-1)  # [T, E]
        ranked = scores.masked_fill(logits == _NOT_THERE, _NOT_THERE)
        if self.model.config.topk_method == "group_limited_greedy":
            ranked = self._in_best_groups(ranked, self._grouped(ranked).amax(dim=-1))
        return self._take(scores, ranked, top_k, normalise=False)

    def _grouped(self, ranked: Tensor) -> Tensor:
        return ranked.view(len(ranked), self.model.config.n_group, -1)  # [T, G, E / G]

    def _in_best_groups(self, ranked: Tensor, worth: Tensor) -> Tensor:
        """Marks as not there what is outside each token's best groups: ranks [T, E] and groups' worth [T, G]."""
        best = torch.topk(worth, self.model.config.topk_group, dim=-1, sorted=False).indices
        chosen = torch.zeros_like(worth, dtype=torch.bool).scatter(1, best, True)
        return self._grouped(ranked).masked_fill(~chosen[..., None], _NOT_THERE).flatten(-2)

    def _take(self, scores: Tensor, ranked: Tensor, top_k: int, normalise: bool) -> tuple[Tensor, Tensor]:
        """Returns weights from `scores` and numbers [T, K] of the experts that rank highest; E for lack of more."""
        ranks, index = torch.topk(ranked, top_k, dim=-1, sorted=False)
        lacking = ranks == _NOT_THERE
        weights = scores.gather(1, index).masked_fill(lacking, 0.0)
        if normalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.model.config.routed_scaling_factor, index.masked_fill(lacking, self.num_experts)


class DeepseekV3Layout(DeepseekV2Layout):
    """DeepSeek-V3: a sigmoid per expert; ranks have a correction bias added; a group is worth its best two experts."""

    family = "deepseek_v3"
    block_class = DeepseekV3MoE

    def gate_values(self, logits: Tensor) -> Tensor:
        """Returns the sigmoids scaled to sum to 1 over all E (ours: eq. 3 wants a distribution, V3 has none).

        The correction bias, which only balances the choice, is left out, as it is from the gate weights.
        """
        scores = torch.sigmoid(logits.float())
        return scores / scores.sum(dim=-1, keepdim=True).clamp_min(1e-20)

    def choose(self, layer: int, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """See `MoELayout`."""
        absent = logits == _NOT_THERE
        bias = self.router(layer).get_buffer("e_score_correction_bias")  # [E]
        scores = torch.sigmoid(logits.float())  # [T, E]
        ranked = (scores + bias).masked_fill(absent, _NOT_THERE)
        best_two = self._grouped(ranked).topk(2, dim=-1).values  # [T, G, 2]
        worth = best_two.masked_fill(best_two == _NOT_THERE, 0.0).sum(dim=-1)
        worth = worth.masked_fill(best_two[..., 0] == _NOT_THERE, _NOT_THERE)
        return self._take(scores, self._in_best_groups(ranked, worth), top_k, bool(self.model.config.norm_topk_prob))
