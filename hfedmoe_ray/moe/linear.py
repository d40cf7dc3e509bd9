"""The one matrix product that experts are made of, whatever form their weights have.

Layouts call `project` instead of torch's `linear`, so that a weight may be a plain matrix or anything that knows how to
multiply: a low-rank correction of a frozen matrix, a quantised one. A family therefore says once what an expert
computes.
"""

from typing import Protocol, runtime_checkable

from torch import Tensor
from torch.nn.functional import linear


@runtime_checkable
class Projection(Protocol):
    """A weight that is not one dense tensor."""

    def project(self, tokens: Tensor) -> Tensor:
        """Returns tokens [T, in] times the weight, [T, out]."""
        ...


Weight = Tensor | Projection
"""One matrix of an expert: [out, in], or [in, out] in families that store it transposed."""


def project(tokens: Tensor, weight: Weight, bias: Tensor | None = None, *, transposed: bool = False) -> Tensor:
    """Returns tokens [T, in] times an expert's matrix, plus a bias [out]: [T, out].

    Args:
        tokens: [T, in].
        weight: [out, in]; [in, out] if `transposed` (a `Projection` knows its own orientation).
        bias: [out].
        transposed: Whether a dense weight is stored as [in, out].
    """
    if isinstance(weight, Tensor):
        return linear(tokens, weight.T if transposed else weight, bias)
    product = weight.project(tokens)
    return product if bias is None else product + bias
