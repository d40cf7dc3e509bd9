"""FLAME (arXiv 2506.16600): every client holds all experts (their factors, with LoRA) and activates k_i of them.

Fewer active experts give another output, which each client makes up for by a factor it learns; an expert that a client
hardly used has learned little there, so averages weigh f^t |D|, f its activation frequency (the paper). The factor is
one number a layer, private to the client: it fits the client's k_i and no other (ours).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from hfedmoe_ray import budget
from hfedmoe_ray.config import strategies as configs
from hfedmoe_ray.strategies.base import Profiles, Strategy
from hfedmoe_ray.strategies.rules import ActivationFrequency
from hfedmoe_ray.strategies.scores import uniform_plan
from hfedmoe_ray.types import ClientInfo, ClientUpdate, ExpertPlan, ModelShape, Role


class Flame(Strategy[configs.Flame]):
    """All experts for everyone, fewer of them active where the budget is small."""

    def __init__(self, config: configs.Flame, shape: ModelShape, seed: int) -> None:
        """Takes the method's hyper-parameters."""
        super().__init__(config, shape, seed)
        self._model = shape
        self.expert_rule = ActivationFrequency(temperature=config.temperature)

    def plan(self, round: int, clients: Sequence[ClientInfo], profiles: Profiles) -> dict[int, ExpertPlan]:
        """All experts, k_i active, each client's factors as it left them."""
        del round, profiles
        return {c.client: self._plan(c, Role.TRAIN) for c in clients}

    def deploy(self, round: int, clients: Sequence[ClientInfo], profiles: Profiles) -> dict[int, ExpertPlan]:
        """The same, to be used."""
        del round, profiles
        return {c.client: self._plan(c, Role.FROZEN) for c in clients}

    def observe(self, round: int, updates: Mapping[int, ClientUpdate], plans: Mapping[int, ExpertPlan]) -> None:
        """Keeps, in the clients' stead, the factors they learned."""
        del round, plans
        for client, update in updates.items():
            if update.scale:
                self.state[_name(client)] = np.array(update.scale)

    def _plan(self, client: ClientInfo, role: Role) -> ExpertPlan:
        scale = self.state.get(_name(client.client), np.ones(self.shape[0]))
        return replace(
            uniform_plan(self.shape, role),
            top_k=budget.active_experts(self.config, client.resident_experts, self._model),
            scale=tuple(scale.tolist()) if self.config.rescale else None,
        )


def _name(client: int) -> str:
    return f"scale.{client}"
