"""Dense families: where they keep their layers and neurons, and how neurons are written as an expert.

Legend: D neurons, F neurons of an expert, H hidden.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfedmoe_ray.moe.layout.fused import MixtralLayout, MoEEncoderLayout
from hfedmoe_ray.moe.upcycle.target import DENSE_FAMILIES


class DenseFamily(ABC):
    """How the models of one dense family become Mixtures of Experts."""

    layers_name: ClassVar[str]
    """Full name of the list of layers."""
    ffn_name: ClassVar[str]
    """Name in a layer of the module whose input is the FFN's, [B, S, H]."""
    direction: ClassVar[str]
    """Which of `neurons` decides by its product with a token whether a neuron is active, [D, H]: what is clustered."""
    places: ClassVar[tuple[tuple[str, str], ...]]
    """Where the MoE keeps what is not a neuron's: patterns of full names and their replacements. The first whose result
    the MoE has is taken; a tensor without a place is left behind."""
    output_bias: ClassVar[str | None] = None
    """Parameter of a MoE block, [H], that is added to what its experts give, if there is one."""

    @staticmethod
    @abstractmethod
    def neurons(layer: nn.Module) -> dict[str, Tensor]:
        """Returns the weights of a layer's FFN by name, the neuron as first dimension: [D, ...], detached views."""

    @staticmethod
    @abstractmethod
    def expert(neurons: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """Returns the tensors of an expert, as its layout names them.

        Args:
            neurons: Like `neurons(layer)`, but only those of the expert, [F, ...].
            scale: Factor on the expert's output.
        """


class Bert(DenseFamily):
    """BERT to our encoder: up with bias, activation, down; the output bias is shared by all experts."""

    layers_name = "encoder.layer"
    ffn_name = "intermediate"
    direction = "up_proj"
    places = (
        (r"^encoder\.layer\.(\d+)\.output\.LayerNorm", r"layer.\1.LayerNorm"),
        (r"^encoder\.layer\.(\d+)\.output\.dense\.bias", r"layer.\1.moe.output_bias"),
        (r"^(?:encoder\.)?", ""),  # layers that stay dense, attention, embeddings
    )
    output_bias = "output_bias"

    @staticmethod
    def neurons(layer: nn.Module) -> dict[str, Tensor]:
        """See `DenseFamily`."""
        up, down = layer.get_submodule("intermediate.dense"), layer.get_submodule("output.dense")
        return {
            "up_proj": up.get_parameter("weight").detach(),
            "up_bias": up.get_parameter("bias").detach(),
            "down_proj": down.get_parameter("weight").detach().T,
        }

    @staticmethod
    def expert(neurons: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """See `DenseFamily`."""
        return {**neurons, "down_proj": scale * neurons["down_proj"].T}


class Llama(DenseFamily):
    """Llama, and what differs from it by its attention's window alone, to Mixtral: SwiGLU without biases."""

    layers_name = "layers"
    ffn_name = "mlp"
    direction = "gate_proj"
    places = ((r"^", "model."),)

    @staticmethod
    def neurons(layer: nn.Module) -> dict[str, Tensor]:
        """See `DenseFamily`."""
        mlp = layer.get_submodule("mlp")
        return {
            "gate_proj": mlp.get_parameter("gate_proj.weight").detach(),
            "up_proj": mlp.get_parameter("up_proj.weight").detach(),
            "down_proj": mlp.get_parameter("down_proj.weight").detach().T,
        }

    @staticmethod
    def expert(neurons: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
        """See `DenseFamily`."""
        gate_up = torch.cat([neurons["gate_proj"], neurons["up_proj"]])
        return {"gate_up_proj": gate_up, "down_proj": scale * neurons["down_proj"].T}


_BY_TARGET: Mapping[str, type[DenseFamily]] = {MoEEncoderLayout.family: Bert, MixtralLayout.family: Llama}


def family_of(dense: PreTrainedModel) -> DenseFamily:
    """Returns how a dense model of one of `DENSE_FAMILIES` becomes a Mixture of Experts."""
    return _BY_TARGET[DENSE_FAMILIES[dense.config.model_type]]()
