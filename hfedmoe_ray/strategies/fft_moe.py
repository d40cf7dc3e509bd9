"""FFT-MoE (arXiv 2508.18663): sparse adapters of one shape for all, k_n of M active, and a load-balancing loss.

Every client trains the whole adapter, so plain averaging by |D_n| works whatever k_n is (the paper). The loss that
keeps the load balanced where clients and budgets differ is ours; what it needs to know of others comes with the plan.

Legend: L MoE layers, M experts a layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from hfedmoe_ray import budget
from hfedmoe_ray.config import strategies as configs
from hfedmoe_ray.strategies.base import Profiles, Strategy
from hfedmoe_ray.strategies.rules import PlainExperts
from hfedmoe_ray.strategies.scores import uniform_plan
from hfedmoe_ray.types import ClientInfo, ExpertPlan, FloatArray, LoadBalance, ModelShape, Role, RoutingProfile


class FFTMoE(Strategy[configs.FFTMoE]):
    """Sparse adapters, alike for all clients."""

    expert_rule = PlainExperts()

    def __init__(self, config: configs.FFTMoE, shape: ModelShape, seed: int) -> None:
        """Takes the method's hyper-parameters."""
        super().__init__(config, shape, seed)
        self._model = shape

    def plan(self, round: int, clients: Sequence[ClientInfo], profiles: Profiles) -> dict[int, ExpertPlan]:
        """All experts, k_n active, and the weight and load of each client's loss."""
        del round
        # In client order: the last bits of their mean depend on it.
        loads = {c: load_of(profiles[c]) for c in sorted(client.client for client in clients) if c in profiles}
        terms = self._terms(clients, loads)
        return {
            c.client: replace(uniform_plan(self.shape, Role.TRAIN), top_k=self._active(c), balance=terms.get(c.client))
            for c in clients
        }

    def deploy(self, round: int, clients: Sequence[ClientInfo], profiles: Profiles) -> dict[int, ExpertPlan]:
        """All experts, k_n active."""
        del round, profiles
        frozen = uniform_plan(self.shape, Role.FROZEN)
        return {c.client: replace(frozen, top_k=self._active(c)) for c in clients}

    def _active(self, client: ClientInfo) -> int:
        return budget.active_experts(self.config, client.resident_experts, self._model)

    def _terms(self, clients: Sequence[ClientInfo], loads: Mapping[int, FloatArray]) -> dict[int, LoadBalance]:
        """Each client's term of the loss (ours). Before anybody's load is known, the batch's own stands for all."""
        config, experts = self.config, self.shape[1]
        if not config.balance:
            return {}
        cohort = np.mean(list(loads.values()), axis=0) if loads else None  # fbar [L, M]
        terms = {}
        for client in clients:
            factor = 1.0 + config.a * (1.0 - self._active(client) / experts)
            if cohort is not None and client.client in loads:
                factor += config.b * jensen_shannon(loads[client.client], cohort)
            terms[client.client] = LoadBalance(
                weight=config.balance * factor,
                rho=0.0 if cohort is None else config.rho,
                load=() if cohort is None else tuple(map(tuple, cohort.tolist())),
            )
        return terms


def load_of(profile: RoutingProfile) -> FloatArray:
    """f: the share of a client's choices that fell on each expert, [L, M]; rows sum to 1."""
    chosen = profile.routed + np.where(profile.routed.sum(axis=1, keepdims=True) > 0, 0.0, 1.0)
    share: FloatArray = chosen / chosen.sum(axis=1, keepdims=True)
    return share


def jensen_shannon(one: FloatArray, other: FloatArray) -> float:
    """Jensen-Shannon divergence of two loads [L, M], mean over layers, in nats: 0 to log 2."""
    middle = (one + other) / 2
    return float((_divergence(one, middle) + _divergence(other, middle)) / 2)


def _divergence(share: FloatArray, reference: FloatArray) -> float:
    logs = np.log(np.divide(share, reference, out=np.ones_like(share), where=share > 0))
    return float((share * logs).sum(axis=1).mean())
