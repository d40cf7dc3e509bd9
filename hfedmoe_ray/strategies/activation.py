"""Baselines that keep the experts a client uses most: `frequency` and FedMoE."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hfedmoe_ray.config import strategies as configs
from hfedmoe_ray.strategies.base import Profiles, Strategy
from hfedmoe_ray.strategies.rules import TrainedExperts, WithTheirExpert
from hfedmoe_ray.strategies.scores import mask, resident_plan, top_experts, uniform_plan
from hfedmoe_ray.types import ClientInfo, ExpertKey, ExpertPlan, FloatArray, Role, RoutingProfile


class FrequentExperts(Strategy[configs.FrequentExperts | configs.FedMoE]):
    """The experts most of a client's tokens are routed to, as many as HFedMoE would hold; averaging by |D_c|.

    The selection of SEER-MoE (arXiv 2404.05089; heavy hitters, there for pruning) and of the baseline FMES in Flux
    (arXiv 2508.19078), made every round from the latest profile (ours).
    """

    needs_profile = True

    def plan(self, round: int, clients: Sequence[ClientInfo], profiles: Profiles) -> dict[int, ExpertPlan]:
        """The most frequent experts within each client's memory budget."""
        del round
        if self.config.resident == "all":
            return {c.client: uniform_plan(self.shape, Role.TRAIN, c.batch_experts) for c in clients}
        return {
            c.client: resident_plan(self.shape, self._residents(c, profiles), self.config.unselected, c.batch_experts)
            for c in clients
        }

    def select(self, batch: RoutingProfile, plan: ExpertPlan, rng: np.random.Generator) -> frozenset[ExpertKey]:
        """The K_c trainable experts that most tokens of the batch are routed to."""
        del rng
        allowed = mask(self.shape, plan.trainable) & (batch.routed > 0)
        budget = plan.batch_budget if plan.batch_budget is not None else allowed.size
        return top_experts(batch.routed, allowed, budget, self.config.scope)

    def deploy(self, round: int, clients: Sequence[ClientInfo], profiles: Profiles) -> dict[int, ExpertPlan]:
        """The same when a client uses the model."""
        del round
        return {
            c.client: resident_plan(self.shape, self._residents(c, profiles), self.config.deployed, None)
            for c in clients
        }

    def _residents(self, client: ClientInfo, profiles: Profiles) -> frozenset[ExpertKey]:
        frequency = profiles[client.client].routed
        return top_experts(frequency, np.ones(self.shape, dtype=bool), client.resident_experts, self.config.scope)


class FedMoE(FrequentExperts):
    """FedMoE (arXiv 2408.11304): each client trains a sub-model of the experts it activates most.

    [paper]: the sub-model is found by observed activation, within the client's memory; its router chooses among its
    own experts (`unselected: reroute`); dense layers are averaged by FedAvg, an expert over its users, router rows with
    their expert; sub-models are adjusted on the way by what others do. [ours]: the first observation is the profiling
    pass, on the whole frozen model instead of a first stage of training; the adjustment is `blend`.
    """

    router_rule = WithTheirExpert(experts=TrainedExperts())

    def blend(self, measured: RoutingProfile, plan: ExpertPlan, cohort: RoutingProfile) -> RoutingProfile:
        """Recommends what the cohort uses: an expert the client does not hold counts as often as others use it (ours).

        A re-routed client sends no token to such an expert, so its own count would keep the first choice for good.
        """
        held = mask(self.shape, plan.present)
        others: FloatArray = cohort.routed * (measured.tokens / cohort.tokens)
        return replace(measured, routed=np.where(held, measured.routed, others))
