"""Rules: how much an update weighs in the mean of an expert, of a router and of the shared parameters.

The three are independent of each other and of the strategy. A strategy comes with its own; the section `rules` of a
configuration replaces any of them by name (`override`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from hfedmoe_ray.config.server import ExpertRuleName, RouterRuleName, Rules, SharedRuleName
from hfedmoe_ray.types import ClientUpdate, ExpertKey, ExpertPlan, FloatArray, RoutingProfile


class ExpertRule(Protocol):
    """How much an update weighs in the mean of one expert; 0 leaves it out."""

    def __call__(self, update: ClientUpdate, plan: ExpertPlan, key: ExpertKey) -> float:
        """Returns the weight of `update` in expert `key`."""


RouterRule = Callable[[ClientUpdate, ExpertPlan, int], FloatArray]
"""(update, plan, L) -> weight of the update in each layer's router, [L], or in each of its rows, [L, E]."""
SharedRule = Callable[[ClientUpdate], float]
"""update -> its weight in the mean of shared parameters."""


# ------------------------------------------------------------------------------------------------------------ experts


class TrainedExperts:
    """|D_c| for every expert the client really trained: FedAvg restricted to what has moved."""

    def __call__(self, update: ClientUpdate, plan: ExpertPlan, key: ExpertKey) -> float:
        """See `ExpertRule`."""
        del plan
        return float(update.samples) if update.trained.get(key, 0) > 0 else 0.0


class PlainExperts:
    """|D_c| for every expert the client was given to train: what it did not train counts with its published value."""

    def __call__(self, update: ClientUpdate, plan: ExpertPlan, key: ExpertKey) -> float:
        """See `ExpertRule`."""
        del plan, key
        return float(update.samples)


@dataclass(frozen=True, kw_only=True)
class SparsityAware:
    """HFedMoE's participation S_c (eq. 16-17 of arXiv 2601.00583): |D_c| 1[e in S_c].

    A client takes part in an expert if its usage reaches the threshold and it trained the expert (ours), or by usage
    alone (`literal`, the paper): then an expert whose gradient was masked throughout drags the mean to its old value.
    """

    threshold: float
    """Least usage u_c(e), absolute (tau / E)."""
    literal: bool = False

    def __call__(self, update: ClientUpdate, plan: ExpertPlan, key: ExpertKey) -> float:
        """See `ExpertRule`."""
        del plan
        used = _profile(update).usage[key] >= self.threshold
        return float(update.samples) if used and (self.literal or update.trained.get(key, 0) > 0) else 0.0


class UsageWeighted:
    """u_c(e) for every expert the client trained (FLEX-MoE, arXiv 2512.23070; "trained" is ours)."""

    def __call__(self, update: ClientUpdate, plan: ExpertPlan, key: ExpertKey) -> float:
        """See `ExpertRule`."""
        del plan
        return float(_profile(update).usage[key]) if update.trained.get(key, 0) > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class ActivationFrequency:
    """f^t |D_c| for every expert the client trained, f the share of its tokens sent there (FLAME, arXiv 2506.16600).

    That the expert must have been trained is ours.
    """

    temperature: float = 1.0

    def __call__(self, update: ClientUpdate, plan: ExpertPlan, key: ExpertKey) -> float:
        """See `ExpertRule`."""
        del plan
        if not update.trained.get(key, 0):
            return 0.0
        profile = _profile(update)
        frequency = float(profile.routed[key]) / max(profile.tokens, 1)
        return float(frequency**self.temperature * update.samples)


# ------------------------------------------------------------------------------------------------------------ routers


def examples_per_layer(update: ClientUpdate, plan: ExpertPlan, layers: int) -> FloatArray:
    """|D_c| for the router of every layer, [L]."""
    del plan
    return np.full(layers, float(update.samples))


@dataclass(frozen=True, kw_only=True)
class GateWeights:
    """Sum over S_c of p_c(e) = u_c(e) s_c(e) (eq. 19, numerator of eq. 20), read per layer (ours).

    S_c are the experts that `experts` lets the client take part in.
    """

    experts: ExpertRule
    lam: float
    """Of eq. 5."""

    def __call__(self, update: ClientUpdate, plan: ExpertPlan, layers: int) -> FloatArray:
        """See `RouterRule`: [L]."""
        del layers
        profile = _profile(update)
        participates = expert_weights(self.experts, update, plan) > 0.0
        weight: FloatArray = np.where(participates, profile.usage * profile.importance(self.lam), 0.0)
        total: FloatArray = weight.sum(axis=1)
        return total


@dataclass(frozen=True, kw_only=True)
class WithTheirExpert:
    """Row e of a router weighs what expert e weighs: FedMoE's rule (arXiv 2408.11304)."""

    experts: ExpertRule

    def __call__(self, update: ClientUpdate, plan: ExpertPlan, layers: int) -> FloatArray:
        """See `RouterRule`: [L, E]."""
        del layers
        return expert_weights(self.experts, update, plan)


@dataclass(frozen=True, kw_only=True)
class SumOfExperts:
    """A layer's router weighs what the client's experts of that layer weigh together (ours).

    With `UsageWeighted`, the share of its gate values that the client could act on.
    """

    experts: ExpertRule

    def __call__(self, update: ClientUpdate, plan: ExpertPlan, layers: int) -> FloatArray:
        """See `RouterRule`: [L]."""
        del layers
        total: FloatArray = expert_weights(self.experts, update, plan).sum(axis=1)
        return total


def expert_weights(rule: ExpertRule, update: ClientUpdate, plan: ExpertPlan) -> FloatArray:
    """Returns the weight of an update in every expert, [L, E]; 0 where its plan let it train none."""
    weights = np.zeros(np.shape(plan.roles))
    for key in plan.trainable:
        weights[key] = rule(update, plan, key)
    return weights


# ------------------------------------------------------------------------------------------------------------- shared


def examples(update: ClientUpdate) -> float:
    """|D_c|: FedAvg's weight."""
    return float(update.samples)


def uniform(update: ClientUpdate) -> float:
    """Every client counts the same."""
    del update
    return 1.0


# ------------------------------------------------------------------------------------------------------------ by name


@dataclass(frozen=True, kw_only=True)
class RuleSet:
    """Everything a `Reducer` and the server need to know to average updates; the defaults are FedAvg's."""

    experts: ExpertRule = field(default_factory=TrainedExperts)
    routers: RouterRule = examples_per_layer
    shared: SharedRule = examples
    literal_router: bool = False
    """Divide a router by |S_global| as eq. 20 is printed, instead of normalising its weights."""
    private_router: bool = False
    """Every client keeps the routers it trained."""
    anchor: float = 0.0
    """Share of the cohort below which an expert's participants are joined by its published value (ours)."""


def override(own: RuleSet, rules: Rules, *, tau: float, lam: float, temperature: float, experts: int) -> RuleSet:
    """Returns a strategy's own rules with those replaced that a configuration names.

    A router rule that looks at experts looks at those of the expert rule beside it, own or named.

    Args:
        own: The strategy's.
        rules: What replaces them.
        tau: Of `sparsity_aware`, where `rules` has none.
        lam: Of `alpha`, where `rules` has none.
        temperature: Of `frequency`, where `rules` has none.
        experts: E.
    """
    threshold = (tau if rules.tau is None else rules.tau) / experts
    expert_rules: dict[ExpertRuleName, ExpertRule] = {
        "trained": TrainedExperts(),
        "plain": PlainExperts(),
        "sparsity_aware": SparsityAware(threshold=threshold),
        "usage_threshold": SparsityAware(threshold=threshold, literal=True),
        "usage_weighted": UsageWeighted(),
        "frequency": ActivationFrequency(temperature=temperature if rules.temperature is None else rules.temperature),
    }
    expert_rule = own.experts if rules.experts is None else expert_rules[rules.experts]
    gate = GateWeights(experts=expert_rule, lam=lam if rules.lam is None else rules.lam)
    router_rules: dict[RouterRuleName, RouterRule] = {
        "size": examples_per_layer,
        "alpha": gate,
        "alpha_literal": gate,
        "rows": WithTheirExpert(experts=expert_rule),
        "private": SumOfExperts(experts=expert_rule),
    }
    shared_rules: dict[SharedRuleName, SharedRule] = {"size": examples, "uniform": uniform}
    kept = rules.routers is None
    own_routers = own.routers
    if isinstance(own_routers, GateWeights | WithTheirExpert | SumOfExperts):
        own_routers = replace(own_routers, experts=expert_rule)
    return RuleSet(
        experts=expert_rule,
        routers=own_routers if rules.routers is None else router_rules[rules.routers],
        shared=own.shared if rules.shared is None else shared_rules[rules.shared],
        literal_router=own.literal_router if kept else rules.routers == "alpha_literal",
        private_router=own.private_router if kept else rules.routers == "private",
        anchor=own.anchor if rules.anchor is None else rules.anchor,
    )


def _profile(update: ClientUpdate) -> RoutingProfile:
    if update.profile is None:
        raise ValueError(f"client {update.client} sent no routing profile; its use of experts cannot be weighed")
    return update.profile
