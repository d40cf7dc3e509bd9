"""A BERT encoder whose feed-forward layers are, or carry, Mixtures of Experts, with a classification head.

It is what `upcycle` makes of a dense sentence encoder, and a transformers model like any other: `save_pretrained`,
`from_pretrained` and the Auto classes work on it. Embeddings, attention and dense layers are transformers' own.

Dropout is 0 everywhere, whatever the dense model's configuration says: the hidden states below the first MoE layer can
then be computed once and cached, and a step repeated with the same seed, on any worker, gives the same bits.

Legend: B batch, S sequence, T = B*S tokens, H hidden, F neurons of one expert, E experts, K top-k, C classes.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.bert.modeling_bert import BertAttention, BertEmbeddings, BertLayer, BertPreTrainedModel

Combine = Literal["sum", "mean"]


class MoEEncoderConfig(BertConfig):
    """A BERT configuration with the shape of its MoE layers."""

    model_type = "hfedmoe_encoder"

    moe_layers: list[int] | None = None
    """Numbers of the layers whose feed-forward part is a Mixture of Experts."""
    num_experts: int = 16
    num_experts_per_tok: int = 4
    expert_size: int = 96
    """F, neurons of one expert."""
    combine: Combine = "sum"
    """How the weights of a token's K experts are scaled. "sum": to sum to K, where experts are the summands of one
    FFN (at K = E and a uniform router every weight is 1: the dense model). "mean": to sum to 1, where they are copies
    of it."""
    adapters: bool = False
    """Whether the experts are adapters: added to a dense feed-forward network that stays, instead of standing in its
    place (FFT-MoE, arXiv 2508.18663)."""
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    tie_word_embeddings: bool = False


def choose_experts(logits: Tensor, top_k: int, combine: Combine) -> tuple[Tensor, Tensor]:
    """Routes tokens: softmax over all E, the K largest, renormalised over these K and scaled as `combine` says.

    Args:
        logits: Router logits, [T, E]; -inf marks an expert that is not there.
        top_k: K.
        combine: See `MoEEncoderConfig.combine`.

    Returns:
        Weights [T, K] in float32 and expert numbers [T, K].
    """
    values, index = torch.topk(torch.softmax(logits.float(), dim=-1), top_k, dim=-1)
    weights = values / values.sum(dim=-1, keepdim=True)
    return (weights * top_k if combine == "sum" else weights), index


class TopKRouter(nn.Module):
    """Linear router without bias."""

    def __init__(self, config: MoEEncoderConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.combine: Combine = config.combine
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logits [T, E], weights [T, K] and expert numbers [T, K] of tokens [T, H]."""
        logits = linear(hidden_states, self.weight)
        return logits, *choose_experts(logits, self.top_k, self.combine)


class FusedExperts(nn.Module):
    """All experts of a layer, one tensor per kind of weight; the output bias is the block's, shared by all."""

    def __init__(self, config: MoEEncoderConfig) -> None:
        super().__init__()
        experts, size, hidden = config.num_experts, config.expert_size, config.hidden_size
        self.up_proj = nn.Parameter(torch.empty(experts, size, hidden))
        self.up_bias = nn.Parameter(torch.empty(experts, size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, size))
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Returns the weighted sum [T, H] of each token's experts; `top_k_*` are [T, K]."""
        combined = torch.zeros_like(hidden_states)
        # unbind, because indexing a stacked tensor writes a gradient of all E experts for each one that is used.
        weights = zip(self.up_proj.unbind(0), self.up_bias.unbind(0), self.down_proj.unbind(0), strict=True)
        for expert, (up, bias, down) in enumerate(weights):
            token, slot = torch.where(top_k_index == expert)
            if len(token):
                output = linear(self.activation(linear(hidden_states[token], up, bias)), down)
                share = output * top_k_weights[token, slot, None]
                combined = combined.index_add(0, token, share.to(combined.dtype))
        return combined


class MoEBlock(nn.Module):
    """Router and experts."""

    def __init__(self, config: MoEEncoderConfig) -> None:
        super().__init__()
        self.gate = TopKRouter(config)
        self.experts = FusedExperts(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps [B, S, H] to [B, S, H]."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # [T, H]
        _, weights, index = self.gate(tokens)
        combined: Tensor = self.experts(tokens, index, weights)
        return combined.view_as(hidden_states)


class MoEFeedForward(MoEBlock):
    """Router, experts and one output bias, in place of a dense feed-forward network."""

    def __init__(self, config: MoEEncoderConfig) -> None:
        super().__init__(config)
        self.output_bias = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Maps [B, S, H] to [B, S, H]."""
        return super().forward(hidden_states) + self.output_bias


class MoEEncoderLayer(GradientCheckpointingLayer):
    """A BERT layer whose feed-forward part is a Mixture of Experts."""

    def __init__(self, config: MoEEncoderConfig, layer: int) -> None:
        super().__init__()
        self.attention = BertAttention(config, layer_idx=layer)
        self.moe = MoEFeedForward(config)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Maps [B, S, H] to [B, S, H]; `attention_mask` as transformers' attention expects it."""
        attended, _ = self.attention(hidden_states, attention_mask)
        return self.LayerNorm(self.moe(attended) + attended)


class AdaptedEncoderLayer(BertLayer):
    """A BERT layer to whose feed-forward network a Mixture of small experts is added.

    Where the experts give zeros it is the BERT layer, bit for bit: x + 0 = x.
    """

    def __init__(self, config: MoEEncoderConfig, layer: int) -> None:
        super().__init__(config, layer_idx=layer)
        self.moe = MoEBlock(config)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Maps [B, S, H] to [B, S, H]; `attention_mask` as transformers' attention expects it."""
        attended, _ = self.attention(hidden_states, attention_mask)
        dense = self.output.dense(self.intermediate(attended))
        return self.output.LayerNorm(dense + self.moe(attended) + attended)


class MoEEncoderForSequenceClassification(BertPreTrainedModel):
    """The encoder, mean pooling over real tokens, and a linear head."""

    config_class = MoEEncoderConfig
    base_model_prefix = "encoder"

    def __init__(self, config: MoEEncoderConfig) -> None:
        super().__init__(config)
        moe_layers = config.moe_layers or []
        self.num_labels = config.num_labels
        self.first_moe_layer = min(moe_layers, default=config.num_hidden_layers)
        moe_layer = AdaptedEncoderLayer if config.adapters else MoEEncoderLayer
        self.embeddings = BertEmbeddings(config)
        self.layer = nn.ModuleList(
            moe_layer(config, i) if i in moe_layers else BertLayer(config, layer_idx=i)
            for i in range(config.num_hidden_layers)
        )
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        match module:
            case TopKRouter():
                init.normal_(module.weight, std=std)
            case FusedExperts():
                init.normal_(module.up_proj, std=std)
                init.zeros_(module.up_bias)
                init.normal_(module.down_proj, std=std)
            case MoEFeedForward():
                init.zeros_(module.output_bias)

    def get_input_embeddings(self) -> nn.Module:
        """Returns the word embeddings."""
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the word embeddings."""
        self.embeddings.word_embeddings = value

    def prefix(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Returns the hidden states that enter the first MoE layer, [B, S, H], from tokens, mask and types [B, S]."""
        hidden_states = self.embeddings(input_ids=input_ids, token_type_ids=token_type_ids)
        return self._run(hidden_states, attention_mask, 0, self.first_moe_layer)

    def encode(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns the text embeddings [B, H] from the states that enter the first MoE layer, [B, S, H]."""
        hidden_states = self._run(hidden_states, attention_mask, self.first_moe_layer, len(self.layer))
        real = attention_mask[..., None].to(hidden_states.dtype)  # [B, S, 1]
        return (hidden_states * real).sum(dim=1) / real.sum(dim=1).clamp_min(1.0)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        hidden_states: Tensor | None = None,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Classifies texts.

        Args:
            input_ids: Tokens, [B, S]; not needed where `hidden_states` is given.
            attention_mask: 1 for real tokens, [B, S]. Default: all are real.
            hidden_states: What `prefix` returned for these tokens, [B, S, H]; the lower layers are then skipped.
            labels: Classes, [B], for a cross-entropy loss.
            token_type_ids: As BERT's tokenizers give them, [B, S]. Default: 0, which clients train with.

        Returns:
            Logits [B, C], and the loss if labels are given.

        Raises:
            ValueError: Neither tokens nor hidden states are given.
        """
        given = hidden_states if hidden_states is not None else input_ids
        if given is None:
            raise ValueError("give input_ids or hidden_states")
        if attention_mask is None:
            attention_mask = torch.ones(given.shape[:2], dtype=torch.long, device=given.device)
        if hidden_states is None:
            hidden_states = self.prefix(given, attention_mask, token_type_ids)
        logits = self.classifier(self.encode(hidden_states, attention_mask))
        loss = None if labels is None else cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def _run(self, hidden_states: Tensor, attention_mask: Tensor, start: int, stop: int) -> Tensor:
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask)
        for layer in self.layer[start:stop]:
            hidden_states = layer(hidden_states, mask)
        return hidden_states


AutoConfig.register(MoEEncoderConfig.model_type, MoEEncoderConfig)
AutoModelForSequenceClassification.register(MoEEncoderConfig, MoEEncoderForSequenceClassification)
