"""What every Mixture-of-Experts family looks like from outside.

The rest of the package never names a family's modules or parameters; it asks the layout. A family states which of its
modules are MoE blocks, the names of one expert's tensors, what an expert computes, and how its router weighs the top-k.

Legend: L MoE layers, E experts, H hidden, B batch, S sequence, T = B*S tokens, K top-k. Layer numbers count MoE layers
only, as in `ExpertKey`. Expert number E stands for "no expert": tokens beyond an expert's capacity are sent there.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hfedmoe_ray.errors import ModelError
from hfedmoe_ray.moe.routing import softmax_gates
from hfedmoe_ray.moe.store import TRAINABLE_GROUPS, Group, LinearSize, Trainable
from hfedmoe_ray.types import ExpertKey, ModelShape

_ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
_ATTENTION_OR_NORM = re.compile(r"attention|attn|norm", re.IGNORECASE)
_TRANSFORMER_LAYER = re.compile(r".*?\.\d+\.")
"""From a block's full name: the transformer layer it is in, up to the first number."""


@dataclass(frozen=True)
class Routing:
    """Where the tokens of one forward pass go in one layer."""

    logits: Tensor
    """As the router returns them: [T, E], or [B, S, E] where routing depends on the sequence."""
    weights: Tensor
    """Gate weights, [T, K]."""
    index: Tensor
    """Expert numbers, [T, K]; E: no expert."""


class MoELayout(ABC):
    """The uniform view of one model."""

    family: ClassVar[str]
    """transformers' model_type."""
    block_class: ClassVar[type[nn.Module]]
    """A MoE block: router and experts."""
    gate_name: ClassVar[str] = "gate"
    """Attribute of a block that holds its router."""
    experts_name: ClassVar[str] = "experts"
    """Attribute of a block that holds its experts, called with tokens [T, H] and two tensors for `read_dispatch`."""
    head_names: ClassVar[tuple[str, ...]] = ("score",)
    """Names of the modules of a head that classifies."""
    transposed: ClassVar[bool] = False
    """Whether an expert's matrices are stored as [in, out]."""
    supports_prefix: ClassVar[bool] = False
    """Whether the model can start from the hidden states that enter its first MoE layer."""

    num_experts: int
    top_k: int
    hidden: int

    def __init__(self, model: PreTrainedModel) -> None:
        """Finds the MoE blocks of `model`, which may be on the meta device; raises ModelError if it has none."""
        self.model = model
        self.heads = () if model.get_output_embeddings() is not None else self.head_names
        """Names of the task head's modules; none for a language model, whose own head is no new one."""
        blocks = [(name, module) for name, module in model.named_modules() if isinstance(module, self.block_class)]
        if not blocks:
            raise ModelError(
                f"model.source: this {self.family} has no MoE layer; its config.json makes all layers dense."
            )
        self.blocks = tuple(module for _, module in blocks)
        """MoE blocks, lowest first."""
        self.block_names = tuple(name for name, _ in blocks)
        self.groups = self._group_parameters()
        """Group of every parameter by its full name."""
        self.projections = {
            name: LinearSize(module.out_features, module.in_features, module.bias is not None)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and _ATTENTION.search(name) and self.groups[f"{name}.weight"] == "top"
        }
        """Full name and size of every linear map of attention from the first MoE layer up: what LoRA adapts there."""

    # --------------------------------------------------------------------------------- what a family has to say

    @property
    @abstractmethod
    def expert_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor of one expert, by name."""

    @abstractmethod
    def read_expert(self, key: ExpertKey) -> dict[str, Tensor]:
        """Returns the tensors of one expert: views of the model's own, detached."""

    @abstractmethod
    def write_expert(self, key: ExpertKey, tensors: Mapping[str, Tensor]) -> None:
        """Copies tensors into one expert of the model."""

    @abstractmethod
    def expert_forward(self, tokens: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns what one expert makes of tokens [T, H], before any gate weight: [T, H]."""

    @abstractmethod
    def choose(self, layer: int, logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Returns gate weights and expert numbers, [T, top_k] each, from router logits in the family's own way.

        Args:
            layer: MoE layer, for what its router knows besides the logits.
            logits: As the router returns them; -inf marks an expert that is not there.
            top_k: Experts of a token; never exceeds the number of those that are there.
        """

    # ---------------------------------------------------------------------- what most families leave as it is

    def gate_values(self, logits: Tensor) -> Tensor:
        """Returns the gate values G_e(x) of eq. 3, float32 [..., E], summing to 1 over all E: here the softmax."""
        return softmax_gates(logits)

    def read_routing(self, output: Any) -> Routing:
        """Reads what the router's forward returned."""
        logits, weights, index = output
        return Routing(logits, weights, index)

    def write_routing(self, routing: Routing) -> Any:
        """Returns a routing as the router's forward returns it: the inverse of `read_routing`."""
        return routing.logits, routing.weights, routing.index

    def read_dispatch(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Returns expert numbers and gate weights, [T, K] each, from what a block hands its experts with the tokens."""
        return first, second

    def apart(self, positions: Tensor) -> dict[str, Any]:
        """Returns the model's arguments by which several texts in a row do not see each other.

        Most of transformers' decoders read off the positions where a text begins, if they are given no mask.

        Args:
            positions: Place of each token in its own text, [B, S].
        """
        return {"position_ids": positions}

    # ------------------------------------------------------------------------------------- what follows from it

    @property
    def layers(self) -> int:
        """L."""
        return len(self.blocks)

    @property
    def decoder_from(self) -> int:
        """The first MoE layer of a decoder that reads other tokens than the encoder below it; L: there is none."""
        return next((n for n, name in enumerate(self.block_names) if name.startswith("decoder.")), self.layers)

    @property
    def start(self) -> int | None:
        """What a decoder reads before its first token; None: there is no encoder beside it."""
        if self.model.get_output_embeddings() is None or not self.model.config.is_encoder_decoder:
            return None
        return int(self.model.config.decoder_start_token_id)

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in fp32."""
        return 4 * sum(math.prod(shape) for shape in self.expert_shapes.values())

    def expert_keys(self) -> Iterator[ExpertKey]:
        """Every expert in (layer, expert) order."""
        return (ExpertKey(layer, expert) for layer in range(self.layers) for expert in range(self.num_experts))

    def router(self, layer: int) -> nn.Module:
        """The router of one MoE layer."""
        router = getattr(self.blocks[layer], self.gate_name)
        assert isinstance(router, nn.Module)
        return router

    @property
    def router_layers(self) -> dict[str, int]:
        """Full name of every router parameter and its MoE layer. Row e of each belongs to expert e."""
        return {
            f"{block}.{self.gate_name}.{name}": layer
            for layer, block in enumerate(self.block_names)
            for name, _ in self.router(layer).named_parameters()
        }

    def shared_names(self, trainable: Trainable) -> tuple[str, ...]:
        """Full names of the shared parameters that train (routers always among them), in the model's order."""
        return tuple(name for name, group in self.groups.items() if group in TRAINABLE_GROUPS[trainable])

    def shape(self, trainable: Trainable, sizes: Mapping[str, int]) -> ModelShape:
        """The model's shape for planning; `sizes` gives the elements of every non-expert parameter by full name."""
        trains = set(self.shared_names(trainable))
        shared = sum(size for name, size in sizes.items() if name in trains)
        return ModelShape(
            layers=self.layers,
            experts=self.num_experts,
            top_k=self.top_k,
            hidden=self.hidden,
            expert_bytes=self.expert_bytes,
            shared_bytes=4 * shared,
            frozen_bytes=4 * (sum(sizes.values()) - shared),
            table_bytes=4 * sum(sizes.get(name, 0) for name in self._tables()),
        )

    def _tables(self) -> list[str]:
        """Full names of the embedding tables."""
        return [f"{name}.weight" for name, one in self.model.named_modules() if isinstance(one, nn.Embedding)]

    def _group_parameters(self) -> dict[str, Group]:
        """Sorts parameters by what they are. "From the first MoE layer up" follows the order of registration."""
        groups: dict[str, Group] = {}
        above = False
        first_layer = _TRANSFORMER_LAYER.match(self.block_names[0])
        assert first_layer is not None
        for name, _ in self.model.named_parameters():
            above = above or name.startswith(first_layer[0])
            groups[name] = self._group(name, above)
        return groups

    def _group(self, name: str, above: bool) -> Group:
        block = next((block for block in self.block_names if name.startswith(block + ".")), None)
        if block is not None:
            part = name.removeprefix(block + ".").split(".")[0]
            # What else a block holds serves every expert (an output bias, shared experts): it trains with the norms.
            return "expert" if part == self.experts_name else "router" if part == self.gate_name else "top"
        if name.split(".", maxsplit=1)[0] in self.heads:
            return "head"
        return "top" if above and _ATTENTION_OR_NORM.search(name) else "rest"


def assign(model: nn.Module, name: str, tensor: Tensor, requires_grad: bool = False) -> None:
    """Makes `tensor` itself, not a copy, the parameter or buffer of that full name."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if leaf in parent._parameters:
        setattr(parent, leaf, nn.Parameter(tensor, requires_grad=requires_grad))
    else:
        parent._buffers[leaf] = tensor


def on_meta(model: nn.Module) -> list[str]:
    """Names of parameters and buffers that have no storage yet."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in named if tensor.device == torch.device("meta")]
