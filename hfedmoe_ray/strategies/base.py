"""What a method is: a policy that makes plans, a rule for each batch, and rules that weight what comes back."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np

from hfedmoe_ray.config.plugins import Configurable
from hfedmoe_ray.config.section import Section
from hfedmoe_ray.strategies.rules import (
    ExpertRule,
    RouterRule,
    RuleSet,
    SharedRule,
    TrainedExperts,
    examples,
    examples_per_layer,
)
from hfedmoe_ray.strategies.scores import mask, top_experts, uniform_plan
from hfedmoe_ray.types import (
    Array,
    ClientInfo,
    ClientUpdate,
    ExpertKey,
    ExpertPlan,
    HeldAs,
    ModelShape,
    Role,
    RoutingProfile,
    Signal,
    Weights,
)

Profiles = Mapping[int, RoutingProfile]
Config = TypeVar("Config", bound=Section)
Report = Callable[[str, Mapping[str, Any]], None]
"""(name of an event, its fields): see `tracking.Tracker.event`."""


def ignore(name: str, fields: Mapping[str, Any]) -> None:
    """Reports to nobody."""
    del name, fields


class Strategy(Configurable, ABC, Generic[Config]):
    """A federated method. What it learns from round to round stands in `state`, so a killed server loses nothing.

    The server calls `study`, `plan`, `observe`, `blend` and `deploy`; the client `select`. On a client `state` is
    empty. The three rules of reduction are independent attributes; the defaults are FedAvg's.
    """

    needs_profile = False
    """Whether a client must be profiled (one forward-only pass) before its first round."""
    expert_rule: ExpertRule = TrainedExperts()
    router_rule: RouterRule = staticmethod(examples_per_layer)
    shared_rule: SharedRule = staticmethod(examples)
    literal_router = False
    """Sum router weights as printed in the paper instead of normalising them."""
    anchor = 0.0
    """Share of a cohort that must take part in an expert for its mean to be taken whole: see `rules.RuleSet.anchor`."""
    proximal = 0.0
    """mu of FedProx: how strongly local steps are pulled towards the weights they started from."""
    signals: frozenset[Signal] = frozenset()
    """What clients measure of each expert while they train, for `observe`."""
    probes: int = 0
    """Directions in which clients estimate the gradient of FROZEN experts, forward only, for the signal "gradient"."""
    profiles_as: HeldAs = "exact"
    """Form of the experts from which clients are profiled (the class means that start a task head are always exact)."""

    def __init__(self, config: Config, shape: ModelShape, seed: int) -> None:
        """Keeps its options, the shape of the model and the run seed, from which every draw derives."""
        self.config = config
        self.shape = (shape.layers, shape.experts)
        self.seed = seed
        self.state: dict[str, Array] = {}
        """Arrays by name; part of every checkpoint."""
        self.report: Report = ignore
        """Where `plan` tells of an event that is no error but should be known; the server sets it."""

    @property
    def rules(self) -> RuleSet:
        """The rules of reduction, as one value."""
        return RuleSet(
            experts=self.expert_rule,
            routers=self.router_rule,
            shared=self.shared_rule,
            literal_router=self.literal_router,
            private_router=self.private_router,
            anchor=self.anchor,
        )

    @rules.setter
    def rules(self, rules: RuleSet) -> None:
        self.expert_rule, self.router_rule, self.shared_rule = rules.experts, rules.routers, rules.shared
        self.literal_router, self.private_router = rules.literal_router, rules.private_router
        self.anchor = rules.anchor

    def study(self, weights: Weights) -> None:
        """Looks at the published weights, before `plan` and `deploy` are asked about them. Default: does not.

        What it keeps must follow from the weights alone: it is not part of a checkpoint.
        """
        del weights

    @abstractmethod
    def plan(self, round: int, clients: Sequence[ClientInfo], profiles: Profiles) -> dict[int, ExpertPlan]:
        """Decides what every client of the cohort holds and may train in this round."""

    def select(self, batch: RoutingProfile, plan: ExpertPlan, rng: np.random.Generator) -> frozenset[ExpertKey]:
        """Decides, on the client, which experts get gradients from one batch.

        Default: every trainable one; where the plan limits a batch, those that most of its tokens are routed to.
        """
        del rng
        if plan.batch_budget is None or plan.batch_budget >= len(plan.trainable):
            return frozenset(plan.trainable)
        allowed = mask(self.shape, plan.trainable) & (batch.routed > 0)
        return top_experts(batch.routed, allowed, plan.batch_budget, "global")

    def selective(self, plan: ExpertPlan) -> bool:
        """Whether `select` may leave out an expert that may train and was routed to.

        If not, a batch that passes through the model in parts need not be looked at as a whole first.
        """
        return plan.batch_budget is not None and plan.batch_budget < len(plan.trainable)

    def observe(self, round: int, updates: Mapping[int, ClientUpdate], plans: Mapping[int, ExpertPlan]) -> None:
        """Learns from a round's accepted updates, by client in ascending order, without their tensors.

        Default: nothing. Whatever it learns belongs into `state`.
        """

    def deploy(self, round: int, clients: Sequence[ClientInfo], profiles: Profiles) -> dict[int, ExpertPlan]:
        """What each client holds when it uses the model after this round. Default: everything.

        A client that makes the model its own (`evaluate.personalised`) trains those of them that have the role TRAIN
        within its batch budget, or where none has, all that it holds.
        """
        del round, profiles
        return {client.client: uniform_plan(self.shape, Role.FROZEN) for client in clients}

    def blend(self, measured: RoutingProfile, plan: ExpertPlan, cohort: RoutingProfile) -> RoutingProfile:
        """The profile the server keeps of a client after a round. Default: as measured."""
        del plan, cohort
        return measured
