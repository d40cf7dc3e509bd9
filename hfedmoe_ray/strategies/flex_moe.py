"""FLEX-MoE (arXiv 2512.23070): the server assigns experts to clients by fitness, under capacity and load balance.

Clients keep their routers to themselves. Of an expert the server learns how well it serves a client, a moving average
over the rounds in which the client held it; a linear program (`assignment`) then gives every client as many experts as
it can hold, such that every expert is held by about as many clients as any other.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from hfedmoe_ray.config import strategies as configs
from hfedmoe_ray.strategies.assignment import assign, count_holders, mean_holders
from hfedmoe_ray.strategies.base import Profiles, Strategy
from hfedmoe_ray.strategies.rules import SumOfExperts, UsageWeighted
from hfedmoe_ray.strategies.scores import mask, resident_plan, top_experts
from hfedmoe_ray.types import (
    Array,
    ClientInfo,
    ClientUpdate,
    ExpertKey,
    ExpertPlan,
    FloatArray,
    ModelShape,
    RoutingProfile,
)


class FlexMoE(Strategy[configs.FlexMoE]):
    """The method of the paper; what is ours in it is said.

    Fitness (paper): Q[c, e] moves by `smoothing` towards the accuracy of the client's examples on e, or exp(-a loss),
    for assigned pairs; the others keep theirs. Q starts at 1, better than anything measured, so that everything is
    tried (ours). An assigned expert that no token was sent to is worth 0 to the client, or its client would hold it
    for ever on expectation alone (ours).

    Loads: with T = sum k_c / (L E) holders an expert on average and its deficit D_e, how many holders it has had less
    than the mean of all experts so far, every expert gets floor((1 - d) T + D_e) to ceil((1 + d) T + D_e) holders
    (the deficit is the paper's, the bounds are ours). Pairs (layer, expert) are assigned, over all layers at once.

    The averaged router serves the global model only, so that there is one to evaluate: no client ever gets it, except
    before its first round. It is the mean of the clients' routers, weighted by their use of the experts they trained
    (ours; experts are weighted so by the paper).

    `state`: "fitness" [C, L, E] and "assigned" bool [C, L, E], of clients up to the highest heard of; "holders" int
    [L, E], how many clients have held each expert.
    """

    # For a client's experts when it uses the model before it was ever assigned any, and as the profiling pass also
    # measures the mean outputs that may stand in for absent experts.
    needs_profile = True
    private_router = True

    def __init__(self, config: configs.FlexMoE, shape: ModelShape, seed: int) -> None:
        """Takes the method's options."""
        super().__init__(config, shape, seed)
        self.signals = frozenset({config.fitness})
        self.expert_rule = UsageWeighted()
        self.router_rule = SumOfExperts(experts=self.expert_rule)

    def fitness(self, client: int) -> FloatArray:
        """Q of a client, [L, E]; 1 where nothing is known."""
        known = self.state.get("fitness")
        return np.ones(self.shape) if known is None or client >= len(known) else known[client]

    def plan(self, round: int, clients: Sequence[ClientInfo], profiles: Profiles) -> dict[int, ExpertPlan]:
        """The assignment of largest fitness within every client's budget and every expert's bounds."""
        del profiles
        if not clients:
            return {}
        budgets = {c.client: c.resident_experts for c in clients}
        lower, upper = self._bounds(budgets)
        assignment = assign(
            {c.client: self.fitness(c.client) for c in clients},
            budgets,
            scope=self.config.scope,
            seed=self.seed,
            round=round,
            lower=lower,
            upper=upper,
        )
        if assignment.relaxed:
            self.report("bounds_relaxed", assignment.event(round))
        return {
            c.client: resident_plan(self.shape, assignment.chosen[c.client], self.config.unselected, c.batch_experts)
            for c in clients
        }

    def select(self, batch: RoutingProfile, plan: ExpertPlan, rng: np.random.Generator) -> frozenset[ExpertKey]:
        """The K_c experts that the batch uses most (ours: the paper has no budget for a batch)."""
        del rng
        allowed = mask(self.shape, plan.trainable) & (batch.routed > 0)
        budget = plan.batch_budget if plan.batch_budget is not None else allowed.size
        return top_experts(batch.routed, allowed, budget, self.config.scope)

    def observe(self, round: int, updates: Mapping[int, ClientUpdate], plans: Mapping[int, ExpertPlan]) -> None:
        """Moves the fitness of assigned pairs towards what was measured, and counts the holders."""
        del round
        if not updates:
            return
        fitness = self._rows("fitness", max(updates), 1.0)
        assigned = self._rows("assigned", max(updates), False)
        for client, update in updates.items():
            held = mask(self.shape, plans[client].trainable)
            served = np.where(_routed(update) > 0, self._served(update), 0.0)
            moved = (1.0 - self.config.smoothing) * fitness[client] + self.config.smoothing * served
            fitness[client] = np.where(held, moved, fitness[client])
            assigned[client] = held
        self.state["fitness"], self.state["assigned"] = fitness, assigned
        self.state["holders"] = count_holders(self.state.get("holders"), self.shape, updates, plans)

    def deploy(self, round: int, clients: Sequence[ClientInfo], profiles: Profiles) -> dict[int, ExpertPlan]:
        """What each client was last assigned, as its own router has learned to use it.

        A client that never was has no router of its own: the experts the global one sends it to most (ours).
        """
        del round
        assigned = self.state.get("assigned", np.zeros((0, *self.shape), dtype=bool))
        plans = {}
        for client in clients:
            own = assigned[client.client] if client.client < len(assigned) else np.zeros(self.shape, dtype=bool)
            residents = frozenset(ExpertKey(int(layer), int(expert)) for layer, expert in np.argwhere(own))
            if not residents:
                usage = profiles[client.client].usage
                everything = np.ones(self.shape, dtype=bool)
                residents = top_experts(usage, everything, client.resident_experts, self.config.scope)
            plans[client.client] = resident_plan(self.shape, residents, self.config.deployed, None)
        return plans

    def _bounds(self, budgets: Mapping[int, int]) -> tuple[FloatArray | None, FloatArray | None]:
        """Fewest and most holders of each expert in this round, before rounding, [L, E]."""
        tolerance = self.config.tolerance
        if tolerance is None:
            return None, None
        holders = self.state.get("holders", np.zeros(self.shape, dtype=np.int64))
        deficit = holders.mean() - holders
        mean = mean_holders(budgets, self.shape)
        return (1.0 - tolerance) * mean + deficit, (1.0 + tolerance) * mean + deficit

    def _served(self, update: ClientUpdate) -> FloatArray:
        """How well each expert served the client, 0..1, [L, E]; only entries of routed experts mean anything."""
        measured = update.signals[self.config.fitness]
        if self.config.fitness == "accuracy":
            return measured
        served: FloatArray = np.exp(-self.config.loss_scale * measured)
        return served

    def _rows(self, name: str, highest: int, start: float | bool) -> Array:
        """A copy of an array of the state, with a row for each client up to the highest."""
        known = self.state.get(name, np.zeros((0, *self.shape), dtype=np.array(start).dtype))
        missing = max(0, highest + 1 - len(known))
        rows: Array = np.concatenate([known, np.full((missing, *self.shape), start, dtype=known.dtype)])
        return rows


def _routed(update: ClientUpdate) -> FloatArray:
    """Tokens that the client sent to each expert, [L, E]."""
    assert update.profile is not None  # updates without one are rejected
    return update.profile.routed
