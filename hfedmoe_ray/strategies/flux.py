"""Flux (arXiv 2508.19078): tune the experts of most use, merge the others, explore by forward passes alone.

A client's memory budget is spent on slots and on merged experts (`configs.Flux.slots`). The best experts by utility
take the first slots and train; in the others, random experts are explored: held as they are, forward only, their
gradient estimated from losses (SPSA), so that the next utilities know of them. All else is merged.

Legend: L MoE layers, E experts, f share of a layer's choices that fall on an expert.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from hfedmoe_ray.config import strategies as configs
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.strategies.base import Profiles, Strategy
from hfedmoe_ray.strategies.merging import merge_absent, principal_components
from hfedmoe_ray.strategies.scores import mask
from hfedmoe_ray.types import (
    ClientInfo,
    ClientUpdate,
    ExpertKey,
    ExpertPlan,
    FloatArray,
    ModelShape,
    Role,
    RoutingProfile,
    Weights,
)


class Flux(Strategy[configs.Flux]):
    """The method of the paper, with the decisions of METHODS where it is silent.

    Its state is, for each client, the latest known squared gradient norm of every expert: "squared_gradient.CLIENT",
    [L, E], 0 where nothing is known.
    """

    needs_profile = True
    profiles_ahead = True
    signals = frozenset({"gradient"})

    def __init__(self, config: configs.Flux, shape: ModelShape, seed: int) -> None:
        """Takes the method's options."""
        super().__init__(config, shape, seed)
        self.profiles_as = config.profile
        self.probes = config.probes
        self._points: list[FloatArray] = []

    def study(self, weights: Weights) -> None:
        """Where each layer's experts lie in the space of their weights."""
        layers, _ = self.shape
        self._points = [principal_components(weights.experts, i, self.config.components) for i in range(layers)]

    def plan(self, round: int, clients: Sequence[ClientInfo], profiles: Profiles) -> dict[int, ExpertPlan]:
        """The most useful experts train, some others are explored, the rest is merged."""
        return {c.client: self._plan(c, profiles[c.client], round) for c in clients}

    def deploy(self, round: int, clients: Sequence[ClientInfo], profiles: Profiles) -> dict[int, ExpertPlan]:
        """The most useful experts as they are, in all slots, and the rest merged."""
        del round
        return {c.client: self._plan(c, profiles[c.client], None) for c in clients}

    def observe(self, round: int, updates: Mapping[int, ClientUpdate], plans: Mapping[int, ExpertPlan]) -> None:
        """Refreshes what is known of gradients, trained or explored."""
        del round, plans
        for client, update in updates.items():
            measured, name = update.signals["gradient"], _name(client)
            self.state[name] = np.where(measured > 0, measured, self.state.get(name, 0.0))

    def utility(self, client: int, profile: RoutingProfile) -> FloatArray:
        """u_e = |D_e| sqrt(mean ||grad_e||^2) [paper], up to a factor common to a client's experts, [L, E].

        |D_e| goes as f_e. The mean is over batches, not examples (ours: it costs nothing). An expert of unknown
        gradient is taken for average (ours), so that before the first round u = f [paper].
        """
        norm = np.sqrt(self.state.get(_name(client), np.zeros(self.shape)))
        known = norm > 0
        utility: FloatArray = frequency(profile) * np.where(known, norm, norm[known].mean() if known.any() else 1.0)
        return utility

    def epsilon(self, round: int) -> float:
        """Share of the slots that train: grows from round to round [paper], linearly (ours)."""
        first, last = self.config.epsilon, max(self.config.epsilon, self.config.epsilon_last)
        return first + (last - first) * min(1.0, (round - 1) / self.config.epsilon_rounds)

    def _plan(self, client: ClientInfo, profile: RoutingProfile, round: int | None) -> ExpertPlan:
        """The plan of a round, or of a client that only uses the model (None)."""
        layers, experts = self.shape
        slots, merged = self.config.slots(client.resident_experts, layers, layers * experts)
        utility = self.utility(client.client, profile)
        keys = [ExpertKey(layer, expert) for layer in range(layers) for expert in range(experts)]
        ranked = sorted(keys, key=lambda key: (-utility[key], key))
        trained: set[ExpertKey] = set()
        held = set(ranked[:slots])
        if round is not None:
            count = min(slots, client.batch_experts, max(1, int(np.rint(self.epsilon(round) * slots))))
            trained = set(ranked[:count])
            rng = generator(self.seed, "explore", round, client.client)
            drawn = rng.permutation(len(keys) - count)[: slots - count]
            held = trained | {ranked[count + int(i)] for i in drawn}
        absent = ~mask(self.shape, frozenset(held))
        return ExpertPlan(
            roles=tuple(
                tuple(_role(ExpertKey(layer, e), trained, held) for e in range(experts)) for layer in range(layers)
            ),
            absent="merge",
            merged=merge_absent(absent, self._points, frequency(profile), merged),
        )


def frequency(profile: RoutingProfile) -> FloatArray:
    """f: the share of a layer's choices that fall on each expert, [L, E]; 0 where no token was seen."""
    total = profile.routed.sum(axis=1, keepdims=True)
    share: FloatArray = np.divide(profile.routed, total, out=np.zeros_like(profile.routed), where=total > 0)
    return share


def _role(key: ExpertKey, trained: set[ExpertKey], held: set[ExpertKey]) -> Role:
    return Role.TRAIN if key in trained else Role.FROZEN if key in held else Role.ABSENT


def _name(client: int) -> str:
    return f"squared_gradient.{client}"
