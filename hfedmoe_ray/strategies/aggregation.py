"""Reduction: weighted means, folded one client at a time in client order, expert by expert.

A rule says how much an update weighs; the `Reducer` does the arithmetic in float64, so that equal contributions give
back exactly what was sent and the fold needs memory for one model, whatever the cohort. Experts nobody contributes to
keep their bytes. The three rules - for experts, routers and shared parameters - are independent, and so is how LoRA
factors are averaged (`lora`).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np

from hfedmoe_ray.strategies.lora import ProductMean, factor_pairs
from hfedmoe_ray.types import Array, ClientUpdate, ExpertKey, ExpertPlan, FloatArray, Prototypes, Weights


class ExpertRule(Protocol):
    """How much an update weighs in the mean of one expert; 0 leaves it out."""

    def __call__(self, update: ClientUpdate, plan: ExpertPlan, key: ExpertKey) -> float:
        """Returns the weight of `update` in expert `key`."""


RouterRule = Callable[[ClientUpdate, ExpertPlan, int], FloatArray]
"""(update, plan, L) -> weight of the update in each layer's router, [L]."""
SharedRule = Callable[[ClientUpdate], float]
"""update -> its weight in the mean of shared parameters."""


def examples(update: ClientUpdate) -> float:
    """|D_c|: FedAvg's weight."""
    return float(update.samples)


def examples_per_layer(update: ClientUpdate, plan: ExpertPlan, layers: int) -> FloatArray:
    """|D_c| for the router of every layer."""
    del plan
    return np.full(layers, float(update.samples))


class TrainedExperts:
    """|D_c| for every expert the client really trained: FedAvg restricted to what has moved."""

    def __call__(self, update: ClientUpdate, plan: ExpertPlan, key: ExpertKey) -> float:
        """See `ExpertRule`."""
        del plan
        return float(update.samples) if update.trained.get(key, 0) > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class SparsityAware:
    """HFedMoE's participation S_c and the weights that follow from it (eq. 16-20 of arXiv 2601.00583).

    A client takes part in an expert if its usage reaches the threshold and it trained the expert (ours), or by usage
    alone (`literal`, the paper): then an expert whose gradient was masked throughout drags the mean to its old value.
    """

    threshold: float
    """Least usage u_c(e), absolute (tau / E)."""
    lam: float
    literal: bool = False

    def participates(self, update: ClientUpdate, plan: ExpertPlan) -> Array:
        """S_c as a bool [L, E] array; only experts the client may train can be in it."""
        profile = update.profile
        if profile is None:
            raise ValueError(f"client {update.client} sent no routing profile; sparsity-aware aggregation needs one")
        result = np.zeros(profile.usage.shape, dtype=bool)
        for key in plan.trainable:
            used = profile.usage[key] >= self.threshold
            result[key] = used and (self.literal or update.trained.get(key, 0) > 0)
        return result

    def __call__(self, update: ClientUpdate, plan: ExpertPlan, key: ExpertKey) -> float:
        """Weight |D_c| 1[e in S_c] of eq. 17."""
        return float(update.samples) if self.participates(update, plan)[key] else 0.0

    def router_weights(self, update: ClientUpdate, plan: ExpertPlan, layers: int) -> FloatArray:
        """Sum over S_c of p_c(e) = u_c(e) s_c(e) (eq. 19, numerator of eq. 20), read per layer (ours), [L]."""
        del layers
        participates = self.participates(update, plan)
        assert update.profile is not None
        weight: FloatArray = np.where(participates, update.profile.usage * update.profile.importance(self.lam), 0.0)
        total: FloatArray = weight.sum(axis=1)
        return total


@dataclass
class _Mean:
    """A weighted mean being folded."""

    total: Array | None = None
    weight: float = 0.0

    def add(self, value: Array, weight: float) -> None:
        if weight <= 0.0:
            return
        scaled = value.astype(np.float64) * weight
        self.total = scaled if self.total is None else self.total + scaled
        self.weight += weight

    def result(self, old: Array, divisor: float | None = None) -> Array:
        """The mean, or the sum over `divisor`; the old array itself if nothing was added."""
        if self.total is None:
            return old
        return (self.total / (self.weight if divisor is None else divisor)).astype(old.dtype)


class MeanOutputs:
    """Folds the mean outputs that stand in for absent experts, weighted by the tokens behind them (ours)."""

    def __init__(self) -> None:
        """Starts empty."""
        self._means: dict[ExpertKey, _Mean] = {}

    def add(self, update: ClientUpdate) -> None:
        """Folds what one client measured on the experts it held."""
        for key, (mean, tokens) in update.means.items():
            self._means.setdefault(key, _Mean()).add(mean, float(tokens))

    def result(self, old: Array | None) -> Array | None:
        """The new [L, E, H] means; experts nobody measured keep theirs."""
        if old is None or not self._means:
            return old
        means = old.copy()
        for key, mean in self._means.items():
            means[key] = mean.result(means[key])
        return means


class ClassMeans:
    """Folds class prototypes into a task head: federated nearest-class-mean.

    The head's logits order classes by distance to their mean feature. Their scale is a choice (ours): the average
    example's own class leads by about log C + 2 before anything is trained, sure but not beyond correction.
    """

    def __init__(self) -> None:
        """Starts empty."""
        self._sums: FloatArray | None = None
        self._counts: FloatArray = np.zeros(0)

    def add(self, prototypes: Prototypes) -> None:
        """Folds one client's sums and counts."""
        sums, counts = prototypes.sums.astype(np.float64), prototypes.counts.astype(np.float64)
        self._sums = sums if self._sums is None else self._sums + sums
        self._counts = counts if self._counts.size == 0 else self._counts + counts

    def head(self, weight: Array, bias: Array) -> tuple[Array, Array]:
        """Returns the head's weight [C, H] and bias [C]; a class nobody has keeps a zero row."""
        if self._sums is None:
            return weight, bias
        seen = self._counts > 0
        centre = self._sums.sum(axis=0) / self._counts.sum()
        means = np.where(seen[:, None], self._sums / np.maximum(self._counts, 1.0)[:, None] - centre, 0.0)
        squares = (means**2).sum(axis=1)
        between = float((squares * self._counts).sum() / self._counts.sum())
        scale = (math.log(len(seen)) + 2.0) / max(between, 1e-12)
        rows = means * scale
        offsets = -scale * squares / 2 - rows @ centre
        return rows.astype(weight.dtype), np.where(seen, offsets, offsets.min()).astype(bias.dtype)


@dataclass
class Reducer:
    """Folds a round's updates into new weights. Call `add` in client order, then `result`."""

    old: Weights
    router_layers: Mapping[str, int]
    """Router parameter name -> its MoE layer; all other shared names are plain shared parameters."""
    layers: int
    """L."""
    expert_rule: ExpertRule
    router_rule: RouterRule
    shared_rule: SharedRule
    literal_router: bool = False
    average: Literal["svd", "factors"] = "factors"
    """LoRA factors: the exact mean of their products at the same rank, or the mean of each factor by itself."""
    _means: dict[tuple[ExpertKey | None, str], _Mean] = field(default_factory=dict)
    """By expert (None: shared) and tensor name."""
    _products: dict[tuple[ExpertKey | None, str], ProductMean] = field(default_factory=dict)
    """By expert and name of factor A."""
    _participants: set[ExpertKey] = field(default_factory=set)

    @property
    def participants(self) -> frozenset[ExpertKey]:
        """S_global: experts that somebody took part in, so far."""
        return frozenset(self._participants)

    def add(self, update: ClientUpdate, plan: ExpertPlan) -> frozenset[ExpertKey]:
        """Folds one update; returns the experts it took part in, S_c."""
        mine = set()
        for key in plan.trainable:
            weight = self.expert_rule(update, plan, key)
            if weight > 0.0:
                mine.add(key)
                # An expert that takes part without having moved was not sent: its value is the published one.
                self._fold(key, update.experts.get(key, self.old.experts[key]), weight)
        router = self.router_rule(update, plan, self.layers)
        layer_of = self.router_layers
        for name, value in update.shared.items():
            if name in layer_of:
                self._fold(None, {name: value}, float(router[layer_of[name]]))
        plain = {name: value for name, value in update.shared.items() if name not in layer_of}
        self._fold(None, plain, self.shared_rule(update))
        self._participants |= mine
        return frozenset(mine)

    def result(self) -> Weights:
        """The next version of the weights; arrays that did not change are the same objects as before."""
        experts = {key: self._averaged(key, tensors) for key, tensors in self.old.experts.items()}
        shared = self._averaged(None, self.old.shared)
        return replace(self.old, version=self.old.version + 1, shared=shared, experts=experts)

    def _fold(self, owner: ExpertKey | None, tensors: Mapping[str, Array], weight: float) -> None:
        """Adds tensors that belong together with one weight."""
        pairs = self._pairs(tensors)
        for a, b in pairs.items():
            self._products.setdefault((owner, a), ProductMean()).add(tensors[a], tensors[b], weight)
        for name in tensors.keys() - pairs.keys() - set(pairs.values()):
            self._means.setdefault((owner, name), _Mean()).add(tensors[name], weight)

    def _averaged(self, owner: ExpertKey | None, old: Mapping[str, Array]) -> dict[str, Array]:
        """New values by name, in the old ones' order; of what nobody contributed to, the old ones."""
        values = dict(old)
        for name in old:
            if (owner, name) in self._means:
                values[name] = self._means[owner, name].result(old[name], self._literal_divisor(name))
        for a, b in self._pairs(old).items():
            if (owner, a) in self._products:
                values[a], values[b] = self._products[owner, a].result(old[a], old[b])
        return values

    def _pairs(self, names: Iterable[str]) -> dict[str, str]:
        return factor_pairs(names) if self.average == "svd" else {}

    def _literal_divisor(self, name: str) -> float | None:
        """|S_global| of eq. 20 for a router when weights are used as printed, else None (normalise)."""
        layer = self.router_layers.get(name)
        if layer is None or not self.literal_router:
            return None
        return float(sum(key.layer == layer for key in self._participants)) or None
