"""HFedMoE (arXiv 2601.00583): importance, information-bottleneck selection, sparsity-aware aggregation.

Two levels of selection: which experts a client keeps for a round (by its memory; ours) and which of them get
gradients from a batch (by its compute; eq. 15). `resident: all` is the paper's setting: no round level. With `coverage`
(ours) the round level is decided for the cohort as a whole.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from hfedmoe_ray.config import strategies as configs
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.strategies.assignment import assign, count_holders
from hfedmoe_ray.strategies.base import Profiles, Strategy
from hfedmoe_ray.strategies.coverage import holders_due, kept_share
from hfedmoe_ray.strategies.rules import GateWeights, SparsityAware
from hfedmoe_ray.strategies.scores import explore, mask, resident_plan, top_experts, uniform_plan
from hfedmoe_ray.types import (
    ClientInfo,
    ClientUpdate,
    ExpertKey,
    ExpertPlan,
    FloatArray,
    ModelShape,
    Role,
    RoutingProfile,
)


class HFedMoE(Strategy[configs.HFedMoE]):
    """The method of the paper, with our decisions (docs/method.md) where the paper is silent.

    `state`, with `coverage`: "holders" int [L, E], how many clients have held each expert.
    """

    needs_profile = True

    def __init__(self, config: configs.HFedMoE, shape: ModelShape, seed: int) -> None:
        """Takes the method's hyper-parameters."""
        super().__init__(config, shape, seed)
        self.expert_rule = SparsityAware(
            threshold=config.threshold / shape.experts, literal=config.participation == "usage"
        )
        self.router_rule = GateWeights(experts=self.expert_rule, lam=config.lam)
        self.literal_router = config.gate_weights == "literal"
        self.anchor = config.held_back

    def score(self, profile: RoutingProfile) -> FloatArray:
        """I(e) of eq. 14, or the importance of eq. 5, [L, E]."""
        beta = self.config.beta if self.config.rank_by == "ib" else 0.0
        return profile.ib_score(self.config.lam, beta)

    def plan(self, round: int, clients: Sequence[ClientInfo], profiles: Profiles) -> dict[int, ExpertPlan]:
        """Residents by score within each client's memory budget, a share of them drawn at random."""
        if self.config.resident == "all":
            return {c.client: uniform_plan(self.shape, Role.TRAIN, c.batch_experts) for c in clients}
        best, explored = {}, {}
        # Of the places that coverage leaves to the clients' own choice.
        share = self.config.explore * (1.0 - self.config.coverage)
        for client in clients:
            score = self.score(profiles[client.client])
            best[client.client] = self._residents(score, client)
            rng = generator(self.seed, "explore", round, client.client)
            explored[client.client] = explore(best[client.client], score, share, rng)
        chosen: Mapping[int, frozenset[ExpertKey]] = explored
        if self.config.coverage > 0 and clients:
            drawn = {client: explored[client] - best[client] for client in best}
            chosen = self._covering(round, clients, profiles, drawn)
        return {
            c.client: resident_plan(self.shape, chosen[c.client], self.config.unselected, c.batch_experts)
            for c in clients
        }

    def select(self, batch: RoutingProfile, plan: ExpertPlan, rng: np.random.Generator) -> frozenset[ExpertKey]:
        """Eq. 15 on one batch: the K_c best of the routed experts that the client may train.

        With coverage that share of them is drawn from all else that was routed to, in any layer (ours).
        """
        allowed = mask(self.shape, plan.trainable) & (batch.routed > 0)
        budget = min(int(allowed.sum()), plan.batch_budget if plan.batch_budget is not None else allowed.size)
        drawn = int(self.config.coverage * budget + rng.random()) if self.config.coverage > 0 else 0
        best = top_experts(self.score(batch), allowed, budget - drawn, self.config.scope)
        left = np.argwhere(allowed & ~mask(self.shape, best))
        return best.union(ExpertKey(*map(int, key)) for key in rng.choice(left, size=drawn, replace=False))

    def deploy(self, round: int, clients: Sequence[ClientInfo], profiles: Profiles) -> dict[int, ExpertPlan]:
        """The best residents by score, without exploration."""
        del round
        residents = {c.client: self._residents(self.score(profiles[c.client]), c) for c in clients}
        return {client: resident_plan(self.shape, r, self.config.deployed, None) for client, r in residents.items()}

    def blend(self, measured: RoutingProfile, plan: ExpertPlan, cohort: RoutingProfile) -> RoutingProfile:
        """Moves the entries of experts the client did not hold towards the cohort's mean (ours).

        A client sees an expert it does not hold only through a router that was trained without it.
        """
        held = mask(self.shape, plan.present)

        def mixed(own: FloatArray, mean: FloatArray) -> FloatArray:
            return np.where(held, own, (1.0 - self.config.decay) * own + self.config.decay * mean)

        return RoutingProfile(
            usage=mixed(measured.usage, cohort.usage),
            specific=mixed(measured.specific, cohort.specific),
            kl=mixed(measured.kl, cohort.kl),
            routed=measured.routed,
            tokens=measured.tokens,
        )

    def observe(self, round: int, updates: Mapping[int, ClientUpdate], plans: Mapping[int, ExpertPlan]) -> None:
        """Counts who held what, where coverage depends on it."""
        del round
        if self.config.coverage > 0:
            self.state["holders"] = count_holders(self.state.get("holders"), self.shape, updates, plans)

    def _covering(
        self,
        round: int,
        clients: Sequence[ClientInfo],
        profiles: Profiles,
        drawn: Mapping[int, frozenset[ExpertKey]],
    ) -> Mapping[int, frozenset[ExpertKey]]:
        """Residents of largest joint score, the `drawn` ones among them, such that every expert has its holders."""
        budgets = {c.client: c.resident_experts for c in clients}
        assignment = assign(
            {c: kept_share(self.score(profiles[c]), budget) for c, budget in budgets.items()},
            budgets,
            scope=self.config.scope,
            seed=self.seed,
            round=round,
            lower=holders_due(
                self.config.coverage, budgets, self.state.get("holders"), shape=self.shape, seed=self.seed
            ),
            fixed=drawn,
        )
        if assignment.relaxed:
            self.report("bounds_relaxed", assignment.event(round))
        return assignment.chosen

    def _residents(self, score: FloatArray, client: ClientInfo) -> frozenset[ExpertKey]:
        return top_experts(score, np.ones(self.shape, dtype=bool), client.resident_experts, self.config.scope)
