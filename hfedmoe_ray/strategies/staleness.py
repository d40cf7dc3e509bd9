"""Updates that started from older weights than they are averaged into (FedBuff, arXiv 2106.06639).

A client that started from version v sends w. What it changed is laid onto the weights x of version v + tau,

    x + (1 + tau)^-a (w - x_v)

in float64, tensor by tensor, and takes part in the average as any update does: the strategy's rules weigh it, and an
expert that nobody trained keeps its bytes. The paper averages the changes themselves; with equal weights that is the
same.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from hfedmoe_ray.types import Array, ClientUpdate, Weights


def discount(tau: int, exponent: float) -> float:
    """(1 + tau)^-a: what a change counts that is tau versions late."""
    return float((1 + tau) ** -exponent)


def rebased(update: ClientUpdate, start: Weights, now: Weights, exponent: float) -> ClientUpdate:
    """Returns an update as if it had started from the newest weights; one that did is returned as it is.

    Args:
        update: What was trained, as values.
        start: The weights it started from, x_v.
        now: Those it is averaged into, x.
        exponent: a.
    """
    tau = now.version - start.version
    if tau == 0:
        return update
    scale = discount(tau, exponent)
    return replace(
        update,
        experts={
            key: _laid_onto(tensors, start.experts[key], now.experts[key], scale)
            for key, tensors in update.experts.items()
        },
        shared=_laid_onto(update.shared, start.shared, now.shared, scale),
    )


def _laid_onto(
    sent: Mapping[str, Array], start: Mapping[str, Array], now: Mapping[str, Array], scale: float
) -> dict[str, Array]:
    return {
        name: (now[name] + scale * (value.astype(np.float64) - start[name])).astype(value.dtype)
        for name, value in sent.items()
    }
