"""Forward-only estimates of how large an expert's gradient is (SPSA, as Flux explores, arXiv 2508.19078).

For a direction z of independent signs, (dL/dz)^2 with dL/dz = (L(W + mu z) - L(W - mu z)) / (2 mu) has the mean
||grad L||^2, up to order mu^2: nothing but losses is needed, and nothing of a backward pass is kept in memory.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hfedmoe_ray.moe.subset import SparseModel
from hfedmoe_ray.seeds import derive_seed
from hfedmoe_ray.types import ExpertKey

STEP = 1e-3
"""mu, MeZO's (arXiv 2305.17333): some percent of a weight, and its effect well above fp32's rounding of a loss."""


def squared_gradients(
    model: SparseModel, loss: Callable[[], float], keys: Iterable[ExpertKey], probes: int, seed: int
) -> dict[ExpertKey, float]:
    """Estimates ||grad_e||^2 of a loss for some FROZEN experts; no weight is changed.

    Args:
        model: A bound model in evaluation mode.
        loss: Computes the loss of one batch, always the same.
        keys: The experts.
        probes: Directions tried for each, two forward passes a direction.
        seed: Of the directions.
    """
    return {key: sum(_probe(model, loss, key, seed, i) ** 2 for i in range(probes)) / probes for key in keys}


@torch.no_grad()
def _probe(model: SparseModel, loss: Callable[[], float], key: ExpertKey, seed: int, number: int) -> float:
    """Returns the loss's derivative along one direction."""
    rng = torch.Generator().manual_seed(derive_seed(seed, "probe", key.layer, key.expert, number))
    held = model.tensors_of(key)
    direction = {name: _signs(tensor, rng) for name, tensor in held.items()}
    losses = []
    for step in (STEP, -STEP):
        # New tensors: the held ones are shared by the clients of the node.
        moved = {name: tensor + step * direction[name] for name, tensor in held.items()}
        with model.replaced(key, moved):
            losses.append(loss())
    return (losses[0] - losses[1]) / (2 * STEP)


def _signs(like: Tensor, rng: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, like.shape, generator=rng).to(like.dtype) * 2 - 1).to(like.device)
