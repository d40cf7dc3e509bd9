"""Updates of clients that never trained: random tensors of two layers of four experts."""

import numpy as np

from hfedmoe_ray.strategies.scores import uniform_plan
from hfedmoe_ray.types import ClientUpdate, ExpertKey, Role, RoutingProfile, Weights

LAYERS, EXPERTS, HIDDEN = 2, 4, 3
KEYS = [ExpertKey(layer, e) for layer in range(LAYERS) for e in range(EXPERTS)]
ROUTERS = {f"gate.{layer}": layer for layer in range(LAYERS)}
PLAN = uniform_plan((LAYERS, EXPERTS), Role.TRAIN)


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return Weights(
        version=3,
        shared={name: rng.normal(size=(EXPERTS, HIDDEN)).astype(np.float32) for name in [*ROUTERS, "head"]},
        experts={key: {"w": rng.normal(size=(5, HIDDEN)).astype(np.float32)} for key in KEYS},
        means=rng.normal(size=(LAYERS, EXPERTS, HIDDEN)).astype(np.float32),
    )


def update(client, trained, seed=None, samples=10, usage=None):
    source = weights(client + 100 if seed is None else seed)
    usage = np.full((LAYERS, EXPERTS), 1 / EXPERTS) if usage is None else usage
    return ClientUpdate(
        client=client,
        samples=samples,
        experts={key: source.experts[key] for key in trained},
        shared=source.shared,
        trained=dict.fromkeys(trained, 2),
        profile=RoutingProfile(
            usage=usage, specific=usage * 2, kl=usage * 0, routed=np.ones((LAYERS, EXPERTS)), tokens=100
        ),
        means={},
    )
