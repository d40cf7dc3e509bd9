"""The adapted experts of a layer computed together: a few large products instead of some small ones for each expert.

On a GPU an expert's share of a batch is too little work for a kernel of its own: starting the kernels of 64 experts one
by one takes longer than computing. Here the frozen matrices of all experts are one stack, the factors of LoRA are
stacked for each forward pass, and torch's grouped product multiplies each expert's tokens by its own matrix. Parameters
stay one tensor for each expert, so that an optimizer can skip any of them.

Each expert's tokens are filled up with rows of zeros to a multiple of `ROWS`, at least so many: the kernels want
aligned groups, and what they give for an empty one is not told. For the backward pass what enters and leaves the
experts is kept once, in the type that is computed in; torch's index_copy and index_add would keep it again, in fp32.

Legend: T tokens, H hidden, U experts of the stack, P pairs of a token and an expert sorted by expert, R rows after
filling up, r rank.
"""

from collections.abc import Callable, Mapping, Sequence
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

    def computes(self, hidden: Tensor) -> bool:
        """Whether products with these tokens are of a type that the kernels take."""
        return hidden.device.type == "cpu" or computing_dtype(hidden) == torch.bfloat16

    def forward(
        self,
        hidden: Tensor,
        token: Tensor,
        weight: Tensor,
        *,
        counts: Sequence[int],
        layout: MoELayout,
        record: Callable[[Tensor], None],
    ) -> Tensor:
        """Returns the weighted sum of each token's experts, [T, H].

        Args:
            hidden: Tokens, [T, H].
            token: Of each pair, sorted by expert, [P].
            weight: Gate weight of each pair, [P].
            counts: How many pairs are each expert's, by number.
            layout: Says what an expert computes.
            record: Told what each pair's expert made of its token, [P, H].
        """
        held = [counts[expert] for expert in self._order]
        sizes = [max(ROWS, -(-count // ROWS) * ROWS) for count in held]
        count, size = (torch.tensor(numbers, device=hidden.device) for numbers in (held, sizes))
        ends = size.cumsum(0)
        # Row of each pair: as far behind the end of the groups before its own as it is in its own.
        shift = torch.repeat_interleave((ends - size) - (count.cumsum(0) - count), count, output_size=len(token))
        row = torch.arange(len(token), device=hidden.device) + shift
        group = torch.repeat_interleave(torch.arange(len(sizes), device=hidden.device), size, output_size=sum(sizes))
        offsets = ends.to(torch.int32)
        weights = {name: self._weight(name, stack, offsets, group) for name, stack in self._stacks.items()}
        rows = _Spread.apply(hidden, token, row, sum(sizes))  # type: ignore[no-untyped-call]
        outputs = layout.expert_forward(rows, weights)
        with torch.no_grad():
            record(outputs.index_select(0, row))
        combined: Tensor = _Combined.apply(outputs, weight, (token, row), hidden)  # type: ignore[no-untyped-call]
        return combined

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


class _Spread(torch.autograd.Function):
    """Each pair's token in its row, in the type that is computed in; other rows are zeros: [T, H] to [R, H]."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, token: Tensor, row: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(token, row)
        ctx.tokens, ctx.dtype = len(hidden), hidden.dtype
        hidden = hidden.to(computing_dtype(hidden))
        return hidden.new_zeros(rows, hidden.shape[1]).index_copy_(0, row, hidden.index_select(0, token))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        token, row = ctx.saved_tensors
        back = gradient.new_zeros(ctx.tokens, gradient.shape[1], dtype=ctx.dtype)
        return back.index_add_(0, token, gradient.index_select(0, row).to(ctx.dtype)), None, None, None


class _Combined(torch.autograd.Function):
    """The weighted sum of each token's rows, in the tokens' own type: [R, H] to [T, H]."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, weight: Tensor, places: tuple[Tensor, Tensor], hidden: Tensor) -> Tensor:
        token, row = places
        ctx.save_for_backward(outputs, weight, token, row)
        pairs = outputs.index_select(0, row) * weight[:, None]
        return torch.zeros_like(hidden).index_add_(0, token, pairs.to(hidden.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        outputs, weight, token, row = ctx.saved_tensors
        pairs = gradient.index_select(0, token)
        to_weight = (pairs * outputs.index_select(0, row)).sum(dim=-1).to(weight.dtype)
        back = torch.zeros_like(outputs).index_copy_(0, row, (pairs * weight[:, None]).to(outputs.dtype))
        return back, to_weight, None, None


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
