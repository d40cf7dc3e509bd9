"""The controls every method is compared with: same backbone, split, local steps and seeds."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hfedmoe_ray.config import strategies as configs
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.strategies.base import Profiles, Strategy
from hfedmoe_ray.strategies.scores import mask, resident_plan, top_experts, uniform_plan
from hfedmoe_ray.types import ClientInfo, ExpertKey, ExpertPlan, ModelShape, Role, RoutingProfile


class FedAvg(Strategy[Any]):
    """Every client trains every expert; averaging by |D_c|. The ceiling that no budget limits."""

    def plan(self, round: int, clients: Sequence[ClientInfo], profiles: Profiles) -> dict[int, ExpertPlan]:
        """All experts, for everyone."""
        del round, profiles
        return {client.client: uniform_plan(self.shape, Role.TRAIN) for client in clients}


class FedProx(FedAvg):
    """As FedAvg, but local steps are pulled towards the published weights (arXiv 1812.06127)."""

    def __init__(self, config: configs.FedProx, shape: ModelShape, seed: int) -> None:
        """Takes mu."""
        super().__init__(config, shape, seed)
        self.proximal = config.mu


class Local(FedAvg):
    """No federation: as FedAvg, but every client keeps what it trained."""

    federated = False


class RandomExperts(Strategy[configs.RandomExperts]):
    """As many experts as HFedMoE would choose, drawn at random; averaging by |D_c| of those who trained an expert."""

    # Not for the choice, which looks at nothing, but because the profiling pass also measures the mean outputs that
    # stand in for absent experts, also when the client uses the model.
    needs_profile = True

    def plan(self, round: int, clients: Sequence[ClientInfo], profiles: Profiles) -> dict[int, ExpertPlan]:
        """A fresh draw for every client and round (or all experts, with the draw made batch by batch)."""
        del profiles
        if self.config.resident == "all":
            return {c.client: uniform_plan(self.shape, Role.TRAIN, c.batch_experts) for c in clients}
        return {
            c.client: resident_plan(self.shape, self._draw(round, c), self.config.unselected, c.batch_experts)
            for c in clients
        }

    def select(self, batch: RoutingProfile, plan: ExpertPlan, rng: np.random.Generator) -> frozenset[ExpertKey]:
        """K_c of the routed trainable experts at random."""
        allowed = mask(self.shape, plan.trainable) & (batch.routed > 0)
        budget = plan.batch_budget if plan.batch_budget is not None else allowed.size
        return top_experts(rng.random(self.shape), allowed, budget, self.config.scope)

    def deploy(self, round: int, clients: Sequence[ClientInfo], profiles: Profiles) -> dict[int, ExpertPlan]:
        """The draw of this round."""
        del profiles
        return {c.client: resident_plan(self.shape, self._draw(round, c), self.config.deployed, None) for c in clients}

    def _draw(self, round: int, client: ClientInfo) -> frozenset[ExpertKey]:
        score = generator(self.seed, "random-experts", round, client.client).random(self.shape)
        return top_experts(score, np.ones(self.shape, dtype=bool), client.resident_experts, self.config.scope)
