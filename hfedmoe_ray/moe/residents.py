"""The experts of one MoE layer as one client holds them: some trainable, some shared and read-only, some not there.

`ResidentExperts` takes the place of a block's fused experts and answers the same call. Only experts that are present
and were chosen compute anything: tokens are sorted by expert once, each expert sees its own slice, and one index_add
puts the results back. Tokens of absent experts are left out, not multiplied by zero, and so are padding tokens, whose
expert output is 0: no real token ever reads it, because attention masks padding and pooling leaves it out.

With `absent` = "merge" the merged experts are units of their own, numbered from E + 1 (E is no expert): tokens of their
members go there, a token that chose several members of one goes there once, with the sum of its gate weights.

Legend: T tokens, H hidden, E experts, K top-k, P pairs of a token and a present or merged expert.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hfedmoe_ray.moe.adapters import AdaptedExperts, frozen_parts
from hfedmoe_ray.moe.derived import SCALE, bits_of, quantised_shapes
from hfedmoe_ray.moe.grouped import GroupedExperts
from hfedmoe_ray.moe.layout import MoELayout, Routing
from hfedmoe_ray.moe.quantised import Int4, Int8
from hfedmoe_ray.moe.routing import RoutingTape
from hfedmoe_ray.types import Array, Bits, ExpertKey, ExpertPlan, Role


@contextmanager
def aliasing() -> Iterator[None]:
    """Permits tensors that alias read-only arrays, which torch warns of.

    The one place where the warning is silenced. Such tensors hold the frozen weights that all clients of a node share:
    they are never parameters, and nothing in this package applies an in-place operation to them, which would corrupt
    them for everyone.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        yield


class ResidentExperts(nn.Module):
    """Present and absent experts of one layer."""

    def __init__(self, layer: int, layout: MoELayout, tape: RoutingTape, adapted: AdaptedExperts | None = None) -> None:
        """Makes a layer in which every expert is absent; `bind` fills it.

        Args:
            layer: Number of the MoE layer.
            layout: The model's layout.
            tape: Where mean outputs are recorded.
            adapted: The frozen experts under LoRA factors, which are then what is bound; None: experts are dense.
        """
        super().__init__()
        self._adapted = adapted
        self.layer = layer
        self._layout = layout
        self._tape = tape
        self._clear()

    def release(self) -> None:
        """Lets go of every expert: all are absent."""
        self._clear()

    def _clear(self) -> None:
        self.trained = nn.ModuleDict()
        """TRAIN experts by number, one parameter per tensor so that an optimizer can skip any of them."""
        self._tensors: dict[int, Mapping[str, Tensor]] = {}
        """Tensors of every present expert by number, as they came: dense ones, LoRA factors, or in few bits."""
        self._weights: dict[int, Mapping[str, Any]] = {}
        """What the layout computes with (a `Weight` by name): the same tensors, or frozen ones under their factors.
        Merged experts are here too, by unit."""
        self._grouped: GroupedExperts | None = None
        """The same experts computed together."""
        self._is_present = torch.zeros(self._layout.num_experts + 1, dtype=torch.bool)  # [E + 1]; E is no expert
        self._unit: Tensor | None = None  # [E + 1]: what computes each expert where some are merged
        self._absent_means: Tensor | None = None  # [E, H], zero where present
        self._reroutes = False
        self._top_k = self._layout.top_k
        self.scale: nn.Parameter | None = None
        """Learnable factor on what the layer gives, [1]."""

    def bind(
        self,
        plan: ExpertPlan,
        experts: Mapping[ExpertKey, Mapping[str, Array]],
        means: Array | None,
        device: torch.device,
        merged: Sequence[Mapping[str, Array]] = (),
    ) -> None:
        """Replaces everything this layer holds.

        Args:
            plan: Role of each expert, what stands in for ABSENT ones, and how many experts a token is routed to.
            experts: Arrays of the present experts. TRAIN experts are copied, FROZEN ones aliased (copied to a GPU).
            means: Mean outputs of this layer's experts, [E, H]; needed for absent = "mean".
            device: Where the layer computes.
            merged: Arrays of the merged experts of all layers, in the plan's order.

        Raises:
            ValueError: An array that the roles ask for is missing or has the wrong shape.
        """
        self._clear()
        roles, absent = plan.roles[self.layer], plan.absent
        for expert, role in enumerate(roles):
            if role is Role.ABSENT:
                continue
            key = ExpertKey(self.layer, expert)
            bits = bits_of(plan, key)
            arrays = self._arrays(key, experts.get(key, {}), bits)
            tensors: dict[str, Tensor]
            if role is Role.TRAIN:
                private = {name: nn.Parameter(torch.tensor(array, device=device)) for name, array in arrays.items()}
                # torch allows no dot in the name of a parameter, and those of factors have one.
                self.trained[str(expert)] = nn.ParameterDict({n.replace(".", "_"): p for n, p in private.items()})
                tensors = dict(private)
            else:
                tensors = _aliased(arrays, device)
            self._tensors[expert] = tensors
            self._weights[expert] = tensors if bits is None else _dequantised(tensors, bits, self._layout)
        if self._adapted:
            adapted, self._grouped = self._adapted.layer(self.layer, self._tensors)
            self._weights.update(adapted)
        present = torch.tensor([role is not Role.ABSENT for role in roles])
        self._is_present = torch.cat([present, torch.tensor([False])]).to(device)
        self._top_k = min(plan.top_k or self._layout.top_k, self._layout.num_experts)
        if plan.scale is not None:
            self.scale = nn.Parameter(torch.tensor([plan.scale[self.layer]], device=device))
        self._reroutes = absent == "reroute" and bool(present.any()) and not bool(present.all())
        if absent == "mean" and not bool(present.all()):
            if means is None:
                raise ValueError("the plan replaces absent experts by their mean output, but no means were published")
            self._absent_means = torch.tensor(means * ~present.numpy()[:, None], dtype=torch.float32, device=device)
        if absent == "merge":
            self._bind_merged(plan, merged, device)

    def _bind_merged(self, plan: ExpertPlan, merged: Sequence[Mapping[str, Array]], device: torch.device) -> None:
        experts = self._layout.num_experts
        if self._adapted or len(merged) != len(plan.merged):
            raise ValueError("merged experts are dense, and published one for each that the plan names")
        here = [(one, arrays) for one, arrays in zip(plan.merged, merged, strict=True) if one.layer == self.layer]
        members = [expert for one, _ in here for expert in one.members]
        if sorted(members) != (~self._is_present[:-1]).nonzero().flatten().tolist():
            raise ValueError(f"layer {self.layer}: the members of merged experts are {members}, not its absent experts")
        if not here:
            return
        self._unit = torch.arange(experts + 1, device=device)
        for unit, (one, arrays) in enumerate(here, start=experts + 1):
            key = one.keys[0]
            self._weights[unit] = _aliased(self._arrays(key, arrays), device)
            self._unit[list(one.members)] = unit
        self._is_present = torch.ones(experts + 1 + len(here), dtype=torch.bool, device=device)
        self._is_present[experts] = False

    def parameters_of(self, expert: int) -> dict[str, nn.Parameter]:
        """Returns the parameters of a TRAIN expert by tensor name."""
        return {name: tensor for name, tensor in self._tensors[expert].items() if isinstance(tensor, nn.Parameter)}

    def tensors_of(self, expert: int) -> Mapping[str, Tensor]:
        """Returns the tensors of a present expert as they are published."""
        return self._tensors[expert]

    @contextmanager
    def replaced(self, expert: int, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Lets a present expert compute with other dense tensors within the block."""
        held = self._weights[expert]
        self._weights[expert] = tensors
        try:
            yield
        finally:
            self._weights[expert] = held

    def frozen_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of FROZEN and merged experts, and with LoRA of the matrices under the others, by full name."""
        for expert, weights in self._weights.items():
            for name, weight in weights.items():
                yield from frozen_parts(f"{self.layer}.{expert}.{name}", weight)

    def route(self, routing: Routing) -> Routing:
        """Returns the routing to use: the router's own, or a new choice: with another top-k, or re-routing."""
        if not self._reroutes and self._top_k == self._layout.top_k:
            return routing
        # Equal to cutting the router's rows to the present experts, softmax and renormalisation included.
        masked = routing.logits.masked_fill(~self._is_present[:-1], float("-inf")) if self._reroutes else routing.logits
        top_k = min(self._top_k, len(self._tensors)) if self._reroutes else self._top_k
        return Routing(routing.logits, *self._layout.choose(self.layer, masked, top_k))

    def forward(self, hidden_states: Tensor, *dispatch: Tensor) -> Tensor:
        """Returns the weighted sum of each token's experts, or what stands in for them: [T, H].

        Args:
            hidden_states: Tokens, [T, H].
            dispatch: The experts of each token and their gate weights, as the family's blocks hand them over.
        """
        top_k_index, top_k_weights = self._layout.read_dispatch(*dispatch)
        tokens, top_k = top_k_index.shape
        once = None
        if self._unit is not None:
            top_k_index, top_k_weights, once = _gathered(self._unit[top_k_index], top_k_weights)
        expert = top_k_index.flatten()  # [T * K]
        pair = self._is_present[expert]
        if once is not None:
            pair = pair & once
        real = self._tape.real(self.layer)
        if real is not None:
            pair = pair & real.repeat_interleave(top_k)
        pairs = pair.nonzero().squeeze(1)  # [P], places in [T * K]
        pairs = pairs[torch.argsort(expert[pairs], stable=True)]
        counts = torch.bincount(expert[pairs], minlength=len(self._is_present)).tolist()
        combined = torch.zeros_like(hidden_states)
        if len(pairs):
            token = pairs // top_k
            weight = top_k_weights.flatten().index_select(0, pairs)
            if self._grouped is not None and self._grouped.computes(hidden_states):
                record = partial(self._tape.record_outputs, self.layer, counts)
                combined = self._grouped.forward(
                    hidden_states, token, weight, counts=counts, layout=self._layout, record=record
                )
            else:
                # index_select rather than [token]: the same gradient by one index_add.
                inputs = torch.split(hidden_states.index_select(0, token), counts)
                outputs = torch.cat([self._compute(e, x) for e, x in enumerate(inputs) if len(x)])  # [P, H]
                combined = combined.index_add(0, token, (outputs * weight[:, None]).to(combined.dtype))
        if self._absent_means is not None:
            shares = top_k_weights.new_zeros(tokens, len(self._is_present)).scatter(1, top_k_index, top_k_weights)
            combined = combined + (shares[:, :-1] @ self._absent_means.to(shares.dtype)).to(combined.dtype)
        return combined if self.scale is None else (combined * self.scale).to(combined.dtype)

    def _compute(self, expert: int, tokens: Tensor) -> Tensor:
        outputs = self._layout.expert_forward(tokens, self._weights[expert])
        if expert < self._layout.num_experts:
            self._tape.record_output(ExpertKey(self.layer, expert), outputs)
        return outputs

    def _arrays(self, key: ExpertKey, arrays: Mapping[str, Array], bits: Bits | None = None) -> dict[str, Array]:
        shapes = {name: np.shape(array) for name, array in arrays.items()}
        expected = dict(self._adapted.factor_shapes if self._adapted else self._layout.expert_shapes)
        if bits is not None:
            expected = quantised_shapes(expected, bits)
        if shapes != expected:
            raise ValueError(f"weights of expert {key.layer}.{key.expert}: got {shapes}, expected {expected}")
        return {name: arrays[name] for name in expected}


def _gathered(unit: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums, for each token, the gate weights of choices that lead to the same unit.

    Args:
        unit: What computes each choice, [T, K].
        weights: Gate weights, [T, K].

    Returns:
        The same units, the weight of each choice's unit in all, and which choices are the first of theirs, [T * K].
    """
    same = unit[:, :, None] == unit[:, None, :]  # [T, K, K]
    summed = (same * weights[:, None, :]).sum(dim=-1)
    return unit, summed, ~same.tril(diagonal=-1).any(dim=-1).flatten()


def _aliased(arrays: Mapping[str, Array], device: torch.device) -> dict[str, Tensor]:
    with aliasing():
        return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def _dequantised(tensors: Mapping[str, Tensor], bits: Bits, layout: MoELayout) -> dict[str, Any]:
    """The tensors of one expert as its layout computes with them: matrices dequantised at each use, biases."""
    weights: dict[str, Any] = {}
    for name, shape in layout.expert_shapes.items():
        if name in tensors:
            weights[name] = tensors[name]
            continue
        values, scale = tensors[f"{name}.{bits}"], tensors[f"{name}.{SCALE}"]
        if bits == "int8":
            weights[name] = Int8(values, scale, layout.transposed)
        else:
            weights[name] = Int4(values, scale, shape[1], layout.transposed)
    return weights
