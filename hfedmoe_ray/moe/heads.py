"""Classification heads for families to which transformers gives none.

A model saved with one of them is read back by these classes, and by the Auto classes once this module is imported. Its
backbone is transformers' own: `AutoModel.from_pretrained` (for Switch Transformer `SwitchTransformersEncoderModel`)
loads it without this package.

Legend: B batch, S sequence, H hidden, C classes.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForSequenceClassification, SwitchTransformersConfig
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.olmoe.modeling_olmoe import OlmoePreTrainedModel
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersEncoderModel


class OlmoeForSequenceClassification(GenericForSequenceClassification, OlmoePreTrainedModel):
    """OLMoE with transformers' own head for decoders: a linear map of the last token's state."""


class SwitchTransformersForSequenceClassification(SwitchTransformersEncoderModel):
    """The encoder of Switch Transformer, mean pooling over real tokens, and a linear head.

    The decoder of a checkpoint is not read.
    """

    def __init__(self, config: SwitchTransformersConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.classifier = nn.Linear(config.d_model, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classifies texts.

        Args:
            input_ids: Tokens, [B, S]; or `inputs_embeds`, [B, S, H].
            attention_mask: 1 for real tokens, [B, S]. Default: all are real.
            inputs_embeds: Embedded tokens instead of `input_ids`.
            labels: Classes, [B], for a cross-entropy loss.
            kwargs: For the encoder.

        Returns:
            Logits [B, C], and the loss if labels are given.
        """
        states = self.encoder(input_ids, attention_mask, inputs_embeds=inputs_embeds, **kwargs).last_hidden_state
        real = states.new_ones(states.shape[:2]) if attention_mask is None else attention_mask.to(states.dtype)
        pooled = (states * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True).clamp_min(1.0)  # [B, H]
        logits = self.classifier(pooled)
        loss = None if labels is None else cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


# Without exist_ok transformers silently ignores a class for one of its own configurations.
for _head in (OlmoeForSequenceClassification, SwitchTransformersForSequenceClassification):
    AutoModelForSequenceClassification.register(_head.config_class, _head, exist_ok=True)
