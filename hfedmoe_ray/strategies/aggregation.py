"""Reduction: weighted means, folded one client at a time in client order, expert by expert.

A rule (`rules`) says how much an update weighs; the `Reducer` does the arithmetic in float64, so that equal
contributions give back exactly what was sent and the fold needs memory for one model, whatever the cohort. Experts
nobody contributes to keep their bytes, and so do router rows where rows are weighed. How LoRA factors are averaged
(`lora`) is independent of that.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from hfedmoe_ray.strategies.lora import ProductMean, factor_pairs
from hfedmoe_ray.strategies.rules import RuleSet
from hfedmoe_ray.types import Array, ClientUpdate, ExpertKey, ExpertPlan, FloatArray, Prototypes, Weights


class _Mean:
    """A weighted mean being folded; a weight may be one number, or one for each row."""

    def __init__(self) -> None:
        self.total: Array | None = None
        self.weight: FloatArray = np.zeros(())  # [] or [rows]

    def add(self, value: Array, weight: float | FloatArray) -> None:
        weights = np.asarray(weight, dtype=np.float64)
        if not (weights > 0.0).any():
            return
        scaled = np.multiply(value, _along_rows(weights, value), dtype=np.float64)
        if self.total is None:
            self.total = scaled
        else:
            self.total += scaled
        self.weight = self.weight + weights

    def result(self, old: Array, divisor: float | None = None) -> Array:
        """The mean, or the sum over `divisor`; the old array itself if nothing was added, and its rows likewise."""
        if self.total is None:
            return old
        if self.weight.ndim == 0:
            return (self.total / (self.weight if divisor is None else divisor)).astype(old.dtype)
        rows, new = self.weight > 0.0, old.copy()
        new[rows] = (self.total[rows] / _along_rows(self.weight[rows], self.total)).astype(old.dtype)
        return new


def _along_rows(weights: FloatArray, value: Array) -> FloatArray:
    """Weights in a shape that multiplies the rows of `value`, or all of it."""
    return weights.reshape(weights.shape + (1,) * (value.ndim - 1)) if weights.ndim else weights


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
    rules: RuleSet
    average: Literal["svd", "factors"] = "factors"
    """LoRA factors: the exact mean of their products at the same rank, or the mean of each factor by itself."""
    _means: dict[tuple[ExpertKey | None, str], _Mean] = field(default_factory=dict)
    """By expert (None: shared) and tensor name."""
    _products: dict[tuple[ExpertKey | None, str], ProductMean] = field(default_factory=dict)
    """By expert and name of factor A."""
    _participants: Counter[ExpertKey] = field(default_factory=Counter)
    """How many clients took part in each expert."""
    _weights: dict[ExpertKey, float] = field(default_factory=dict)
    """Their weights, summed."""
    _clients: int = 0

    @property
    def participants(self) -> frozenset[ExpertKey]:
        """S_global: experts that somebody took part in, so far."""
        return frozenset(self._participants)

    def add(self, update: ClientUpdate, plan: ExpertPlan) -> frozenset[ExpertKey]:
        """Folds one update; returns the experts it took part in, S_c."""
        mine = set()
        for key in plan.trainable:
            weight = self.rules.experts(update, plan, key)
            if weight > 0.0:
                mine.add(key)
                self._weights[key] = self._weights.get(key, 0.0) + weight
                # An expert that takes part without having moved was not sent: its value is the published one.
                self._fold(key, update.experts.get(key, self.old.experts[key]), weight)
        router = self.rules.routers(update, plan, self.layers)
        layer_of = self.router_layers
        for name, value in update.shared.items():
            if name in layer_of:
                self._fold(None, {name: value}, router[layer_of[name]])
        plain = {name: value for name, value in update.shared.items() if name not in layer_of}
        self._fold(None, plain, self.rules.shared(update))
        self._participants.update(mine)
        self._clients += 1
        return frozenset(mine)

    def result(self) -> Weights:
        """The next version of the weights; arrays that did not change are the same objects as before. Call it once."""
        self._hold_back()
        experts = {key: self._averaged(key, tensors) for key, tensors in self.old.experts.items()}
        shared = self._averaged(None, self.old.shared)
        return replace(self.old, version=self.old.version + 1, shared=shared, experts=experts)

    @property
    def rows(self) -> dict[str, Array]:
        """Rows averaged so far, bool [rows], of the router parameters that are weighed row by row."""
        return {name: mean.weight > 0.0 for (_, name), mean in self._means.items() if mean.weight.ndim}

    def _hold_back(self) -> None:
        """Lets the published value take part in experts that few clients did, in the place of those who are missing."""
        wanted = self.rules.anchor * self._clients
        for key, count in self._participants.items():
            if count < wanted:
                self._fold(key, self.old.experts[key], self._weights[key] * (wanted - count) / count)

    def _fold(self, owner: ExpertKey | None, tensors: Mapping[str, Array], weight: float | FloatArray) -> None:
        """Adds tensors that belong together with one weight."""
        pairs = self._pairs(tensors)
        for a, b in pairs.items():
            self._products.setdefault((owner, a), ProductMean()).add(tensors[a], tensors[b], float(weight))
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
        if layer is None or not self.rules.literal_router:
            return None
        return float(sum(key.layer == layer for key in self._participants)) or None
