"""LoRA while it computes: over the experts a client holds by our own small module, on attention by peft.

peft adapts the experts of a layer as one tensor, whose cost does not shrink with the experts a client holds; here every
expert has factors of its own. The frozen matrices are memory-mapped from the prepared model: they exist once per node,
in the page cache, and those of an absent expert are never read.

Legend: T tokens, r rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import linear
from transformers import PreTrainedModel

from hfedmoe_ray.config.lora import Lora
from hfedmoe_ray.moe.factors import factor_shapes, matrices
from hfedmoe_ray.moe.frozen_experts import Frozen, FrozenExperts
from hfedmoe_ray.moe.grouped import GroupedExperts, groups_on
from hfedmoe_ray.moe.layout import MoELayout
from hfedmoe_ray.moe.linear import project
from hfedmoe_ray.moe.quantised import Quantised
from hfedmoe_ray.moe.store import LinearSize
from hfedmoe_ray.types import LORA_A, LORA_B, ExpertKey


@dataclass(frozen=True, eq=False)
class LowRank:
    """A frozen matrix with a trainable correction: W + scale B A (a `Projection`)."""

    base: Tensor | Quantised
    """W, [out, in]; [in, out] if `transposed`."""
    a: Tensor
    """A, [r, in]."""
    b: Tensor
    """B, [out, r]."""
    scale: float
    transposed: bool

    def project(self, tokens: Tensor) -> Tensor:
        """See `Projection`."""
        correction = linear(linear(tokens, self.a), self.b)
        return project(tokens, self.base, transposed=self.transposed) + self.scale * correction

    def merged(self) -> Tensor:
        """Returns W + scale B A as one fp32 matrix, oriented as W is stored; the sum is rounded once."""
        product = self.scale * (self.b.double() @ self.a.double())
        dense = self.base if isinstance(self.base, Tensor) else self.base.dense(torch.float32)
        return (dense.double() + (product.T if self.transposed else product)).float()


class AdaptedExperts:
    """The frozen experts of a prepared model, and how factors go over them."""

    def __init__(
        self,
        prepared: Path,
        lora: Lora,
        layout: MoELayout,
        device: torch.device,
        held: Mapping[str, Tensor],
    ) -> None:
        """Maps the experts' file; nothing is read yet.

        Args:
            prepared: Directory of the prepared model.
            lora: Rank, scale and the form of the frozen experts.
            layout: The model's layout.
            device: Where to compute.
            held: The frozen tensors, where another process has read them onto the device (`sharing.read_frozen`).

        Raises:
            ModelError: The form `lora.base` is not there, or cannot be used on this machine.
        """
        self._lora = lora
        self._device = device
        self._transposed = layout.transposed
        self._names = tuple(layout.expert_shapes)
        self._matrices = matrices(layout.expert_shapes, layout.transposed)
        self._frozen = FrozenExperts(
            prepared, lora.base, layout.expert_shapes, transposed=layout.transposed, device=device, held=held
        )
        self._kept: dict[int, tuple[tuple[int, ...], tuple[dict[str, Frozen], Sequence[int]]]] = {}
        """By layer, the experts last asked for together and their stacks."""
        self.factor_shapes = factor_shapes(layout.expert_shapes, layout.transposed, lora.rank)
        """Shapes of one expert's factors."""

    def weights(self, key: ExpertKey, factors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Returns one expert as its layout computes with it: frozen biases, and matrices with their corrections.

        Args:
            key: The expert.
            factors: Its factors, of the shapes `factor_shapes`.
        """
        return self._adapted({name: self._frozen.one(key, name) for name in self._names}, factors)

    def layer(
        self, layer: int, factors: Mapping[int, Mapping[str, Tensor]]
    ) -> tuple[dict[int, dict[str, Any]], GroupedExperts | None]:
        """Returns the experts of a layer as its layout computes with them, and where that pays all of them together.

        Args:
            layer: Number of the MoE layer.
            factors: Factors of each present expert by number.
        """
        if factors and groups_on(self._device):
            stacks, order = self._stacks_of(layer, tuple(sorted(factors)))
            grouped = GroupedExperts(order, stacks, factors, scale=self._lora.scale, transposed=self._transposed)
            if grouped.aligned:
                places = {expert: place for place, expert in enumerate(order)}
                single = {
                    expert: {name: _one(stack, places[expert]) for name, stack in stacks.items()} for expert in factors
                }
                return {expert: self._adapted(single[expert], own) for expert, own in factors.items()}, grouped
        return {expert: self.weights(ExpertKey(layer, expert), own) for expert, own in factors.items()}, None

    def _stacks_of(self, layer: int, experts: tuple[int, ...]) -> tuple[dict[str, Frozen], Sequence[int]]:
        """The stacks of those experts, kept until others are asked for: clients that hold all are alike in this."""
        asked, found = self._kept.get(layer, ((), None))
        if found is None or asked != experts:
            self._kept.pop(layer, None)  # before others take its room
            found = self._frozen.stacks(layer, experts)
            self._kept[layer] = (experts, found)
        return found

    def _adapted(self, frozen: Mapping[str, Frozen], factors: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            name: LowRank(
                one, factors[f"{name}.{LORA_A}"], factors[f"{name}.{LORA_B}"], self._lora.scale, self._transposed
            )
            if name in self._matrices
            else one
            for name, one in frozen.items()
        }

    def merged(self, key: ExpertKey, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns one expert as dense fp32 tensors, factors merged into its matrices."""
        weights = self.weights(key, factors).items()
        return {name: weight.merged() if isinstance(weight, LowRank) else weight for name, weight in weights}


def _one(stack: Frozen, place: int) -> Frozen:
    return stack[place] if isinstance(stack, Tensor) else stack.one(place)


def frozen_parts(name: str, weight: Tensor | LowRank | Quantised) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of a weight that no optimizer may write, by name."""
    if isinstance(weight, LowRank):
        yield from frozen_parts(f"{name}.base", weight.base)
        yield from frozen_parts(f"{name}.{LORA_A}", weight.a)
        yield from frozen_parts(f"{name}.{LORA_B}", weight.b)
    elif isinstance(weight, Quantised):
        yield from ((f"{name}.{part}", tensor) for part, tensor in weight.tensors.items())
    elif not isinstance(weight, Parameter):
        yield name, weight


def adapt_attention(model: PreTrainedModel, projections: Mapping[str, LinearSize], lora: Lora) -> dict[str, str]:
    """Lets peft put factors, without storage yet, beside linear maps of attention.

    Args:
        model: A model on the meta device.
        projections: The linear maps to adapt (`MoELayout.projections`).
        lora: Rank and scale.

    Returns:
        New full names of the parameters of these maps, by their old ones.
    """
    from peft import LoraConfig, inject_adapter_in_model

    before = {id(parameter): name for name, parameter in model.named_parameters()}
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(projections),
        lora_dropout=0.0,
        bias="none",
        init_lora_weights=False,
    )
    inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    after = {before.get(id(parameter)): name for name, parameter in model.named_parameters()}
    return {old: new for old, new in after.items() if old is not None and old != new}


def merge_attention(
    base: Mapping[str, Tensor], shared: Mapping[str, Tensor], projections: Mapping[str, LinearSize], scale: float
) -> dict[str, Tensor]:
    """Returns shared parameters under the plain model's names, factors of attention merged into its matrices.

    Args:
        base: Non-expert tensors of the prepared model.
        shared: Trained shared parameters.
        projections: The linear maps that may have factors.
        scale: Factor of their product.
    """
    merged = dict(shared)
    for name in projections:
        a = merged.pop(f"{name}.{LORA_A}.default.weight", None)
        if a is not None:
            b = merged.pop(f"{name}.{LORA_B}.default.weight")
            merged[f"{name}.weight"] = LowRank(base[f"{name}.weight"], a, b, scale, transposed=False).merged()
    return merged
