"""The load-balancing term of a client's loss, where its plan has one (`types.LoadBalance`).

Per MoE layer M sum_m F_m P_m, with f_m the share of the batch's choices that fell on expert m, P_m its mean gate value
and F = (1 - rho) f + rho fbar; the term is lambda_n times the mean over layers. The gradient passes through P alone, so
a router moves its probability away from what is loaded: on this client and, by rho, in the whole cohort (ours). With
rho 0 it is the loss of Switch Transformer (arXiv 2101.03961), which is lambda_n where loads are uniform.

Legend: N real tokens, K top-k, M experts (E elsewhere).
"""

import torch
from torch import Tensor

from hfedmoe_ray.moe.routing import RoutingTape
from hfedmoe_ray.types import LoadBalance


def balance_loss(tape: RoutingTape, balance: LoadBalance) -> Tensor:
    """Returns the term for the latest forward pass, with its graph.

    A batch that passes in parts has the term of each part: f is counted in each, not over the whole batch.

    Args:
        tape: The routing, recorded while `differentiable`.
        balance: Weight, and the cohort's load.
    """
    terms = []
    for layer, (gates, index) in enumerate(zip(tape.gates, tape.index, strict=True)):
        assert gates is not None
        assert index is not None
        experts = gates.shape[1]
        chosen = torch.bincount(index.flatten(), minlength=experts + 1)[:experts].float()  # without "no expert"
        load = chosen / chosen.sum().clamp_min(1.0)  # [M]
        if balance.rho:
            load = (1.0 - balance.rho) * load + balance.rho * load.new_tensor(balance.load[layer])
        terms.append(experts * (load * gates.mean(dim=0)).sum())
    return balance.weight * torch.stack(terms).mean()
