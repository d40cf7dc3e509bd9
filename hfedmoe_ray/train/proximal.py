"""FedProx's proximal term (mu / 2) ||w - w_0||^2 (arXiv 1812.06127), w_0 the published weights a client starts from.

It is added to the loss of a step for exactly what the step moves: shared parameters and the experts of the batch's
selection. A masked expert has no part in it, so it keeps its bytes. Its gradient mu (w - w_0) is added by autograd, so
it is scaled, accumulated, clipped and partitioned as every other. Its value nobody reads: it is not computed (ours).

It costs 14 % of a step's time and 3 % of its memory where every expert of the benchmarks' model trains (117 million
parameters, 512 tokens), and 6 % and 3 % where a quarter is held. On a GPU the start is one more copy of what trains.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hfedmoe_ray.moe.residents import aliasing
from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.types import Array, ExpertKey, TaskWeights


class Proximity:
    """Pulls what trains towards where it started."""

    def __init__(self, mu: float, model: SparseModel, weights: TaskWeights) -> None:
        """Notes the start: on a CPU the published arrays themselves, of which there is one copy a node.

        Args:
            mu: Strength of the pull; 0 costs nothing.
            model: Bound to `weights`.
            weights: What the task starts from.
        """
        self._mu = mu
        self._pairs: dict[ExpertKey | None, list[tuple[nn.Parameter, Tensor]]] = {}
        if mu:
            self._pairs[None] = _paired(model.shared_parameters, weights.shared)
            for key, parameters in model.expert_parameters.items():
                self._pairs[key] = _paired(parameters, weights.experts[key])

    def term(self, active: Collection[ExpertKey]) -> Tensor | float:
        """Returns what to add to a step's loss: 0, with the gradient of the proximal term.

        Args:
            active: The experts that the step moves.
        """
        if not self._mu:
            return 0.0
        term = torch.zeros(())
        for key in (None, *active):
            for parameter, start in self._pairs[key]:
                term = term + _Pull.apply(parameter, start, self._mu)  # type: ignore[no-untyped-call]
        return term


def _paired(parameters: Mapping[str, nn.Parameter], arrays: Mapping[str, Array]) -> list[tuple[nn.Parameter, Tensor]]:
    with aliasing():
        return [(one, torch.from_numpy(arrays[name]).to(one.device)) for name, one in parameters.items()]


class _Pull(torch.autograd.Function):
    """0, with the gradient mu (w - w_0)."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, start: Tensor, mu: float) -> Tensor:
        ctx.parameter, ctx.start, ctx.mu = parameter, start, mu
        return parameter.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (ctx.parameter.detach() - ctx.start).mul_(ctx.mu * grad), None, None
