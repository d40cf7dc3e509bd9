"""The adapted experts of a layer computed together: a few large products instead of some small ones for each expert.

On a GPU an expert's share of a batch is too little work for a kernel of its own: starting the kernels of 64 experts one
by one takes longer than computing. Here the frozen matrices of all experts are one stack, the factors of LoRA are
stacked for each forward pass, and torch's grouped product multiplies each expert's tokens by its own matrix. Parameters
stay one tensor for each expert, so that an optimizer can skip any of them.

Each expert's tokens are filled up with rows of zeros to a multiple of `ROWS`, at least so many: the kernels want
aligned groups, and what they give for an empty one is not told.

Legend: U experts of the stack, P pairs of a token and an expert sorted by expert, R rows after filling up, r rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hfedmoe_ray.moe.frozen_experts import Frozen
from hfedmoe_ray.moe.layout import MoELayout
from hfedmoe_ray.moe.quantised import Quantised, computing_dtype
from hfedmoe_ray.types import LORA_A, LORA_B

ROWS = 8
"""What sizes of groups and matrices must be multiples of: 16 bytes in bf16."""


def groups_on(device: torch.device) -> bool:
    """Whether computing experts together pays on a device, and torch can (from 2.10)."""
    return device.type == "cuda" and hasattr(functional, "grouped_mm")


class GroupedExperts:
    """Adapted experts of one layer."""

    def __init__(
        self,
        order: Sequence[int],
        stacks: Mapping[str, Frozen],
        factors: Mapping[int, Mapping[str, Tensor]],
        *,
        scale: float,
        transposed: bool,
    ) -> None:
        """Takes what is bound.

        Args:
            order: Number of each expert of the stacks.
            stacks: Frozen tensors by name, [U, ...].
            factors: LoRA factors of the present experts by name; what is in `order` and not here gets no token.
            scale: Factor of B A.
            transposed: Whether matrices are [in, out].
        """
        self._order, self._stacks, self._factors = order, stacks, factors
        self._scale, self._transposed = scale, transposed
        self._nothing = {name: torch.zeros_like(one) for name, one in next(iter(factors.values())).items()}

    @property
    def aligned(self) -> bool:
        """Whether all factors have sizes that the kernels take."""
        return all(size % ROWS == 0 for factor in self._nothing.values() for size in factor.shape)

    def computes(self, tokens: Tensor) -> bool:
        """Whether products with these tokens are of a type that the kernels take."""
        return tokens.device.type == "cpu" or computing_dtype(tokens) == torch.bfloat16

    def forward(self, tokens: Tensor, counts: Sequence[int], layout: MoELayout) -> Tensor:
        """Returns what each expert makes of its tokens, [P, H].

        Args:
            tokens: Sorted by expert, [P, H].
            counts: How many are each expert's, by number.
            layout: Says what an expert computes.
        """
        held = [counts[expert] for expert in self._order]
        sizes = [max(ROWS, -(-count // ROWS) * ROWS) for count in held]
        device = tokens.device
        count, size = (torch.tensor(numbers, device=device) for numbers in (held, sizes))
        ends = size.cumsum(0)
        # Row of each pair: as far behind the end of the groups before its own as it is in its own.
        shift = torch.repeat_interleave((ends - size) - (count.cumsum(0) - count), count, output_size=len(tokens))
        row = torch.arange(len(tokens), device=device) + shift
        rows = tokens.new_zeros(sum(sizes), tokens.shape[1]).index_copy(0, row, tokens)
        group = torch.repeat_interleave(torch.arange(len(sizes), device=device), size, output_size=sum(sizes))
        offsets = ends.to(torch.int32)
        weights = {name: self._weight(name, stack, offsets, group) for name, stack in self._stacks.items()}
        return layout.expert_forward(rows, weights).index_select(0, row)

    def _weight(self, name: str, stack: Frozen, offsets: Tensor, group: Tensor) -> Any:
        if f"{name}.{LORA_A}" not in self._nothing:
            assert isinstance(stack, Tensor)
            return stack.index_select(0, group)  # a bias: one for each row
        a, b = (self._stacked(f"{name}.{factor}") for factor in (LORA_A, LORA_B))
        return GroupedLowRank(stack, a, b, self._scale, self._transposed, offsets)

    def _stacked(self, name: str) -> Tensor:
        nothing = self._nothing[name]
        return torch.stack([self._factors[e][name] if e in self._factors else nothing for e in self._order])


@dataclass(frozen=True, eq=False)
class GroupedLowRank:
    """W + scale B A of each expert for its own tokens (a `Projection`)."""

    base: Frozen
    """W of each expert, [U, out, in]; [U, in, out] if `transposed`."""
    a: Tensor
    """A, [U, r, in]."""
    b: Tensor
    """B, [U, out, r]."""
    scale: float
    transposed: bool
    offsets: Tensor
    """Where each expert's rows end, int32 [U]."""

    def project(self, tokens: Tensor) -> Tensor:
        """Returns rows [R, in] times each one's own matrix, [R, out]."""
        tokens = tokens.to(computing_dtype(tokens))
        product: Tensor = _Product.apply(tokens, self.base, self.offsets, self.transposed)  # type: ignore[no-untyped-call]
        low = _grouped(tokens, self.a.to(tokens.dtype).transpose(-2, -1), self.offsets)
        return product + self.scale * _grouped(low, self.b.to(tokens.dtype).transpose(-2, -1), self.offsets)


class _Product(torch.autograd.Function):
    """Rows times frozen matrices, which are widened again in the backward pass and not kept."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, base: Frozen, offsets: Tensor, transposed: bool) -> Tensor:
        ctx.base, ctx.transposed = base, transposed
        ctx.save_for_backward(offsets)
        dense = _dense(base, tokens.dtype)
        return _grouped(tokens, dense if transposed else dense.transpose(-2, -1), offsets)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (offsets,) = ctx.saved_tensors
        dense = _dense(ctx.base, gradient.dtype)
        back = dense.transpose(-2, -1) if ctx.transposed else dense
        return _grouped(gradient.contiguous(), back, offsets), None, None, None


def _dense(base: Frozen, dtype: torch.dtype) -> Tensor:
    return base.dense(dtype) if isinstance(base, Quantised) else base.to(dtype)


def _grouped(tokens: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    product: Tensor = functional.grouped_mm(tokens, matrices, offs=offsets)
    return product
