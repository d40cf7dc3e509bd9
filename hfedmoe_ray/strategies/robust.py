"""Reduction by robust rules: what `Reducer` folds into means is kept until all of a round is there, group by group.

The groups are those that have their own contributors: each expert, each router (each row of it where rows are weighed)
and the shared parameters. A strategy's rules say who takes part and with what weight, as ever.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import hypot
from statistics import median

import numpy as np

from hfedmoe_ray.config.robust import Robust
from hfedmoe_ray.strategies.aggregation import ClassMeans, MeanOutputs, Reducer
from hfedmoe_ray.strategies.robust_rules import Contribution, combined
from hfedmoe_ray.types import Array, ClientUpdate, ExpertKey, ExpertPlan, FloatArray, Prototypes, Weights

_Group = tuple[ExpertKey | None, tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class _Part:
    """What a client has made of a group."""

    tensors: Mapping[str, Array]
    weight: FloatArray
    """[] or [rows]."""
    scale: float
    """Of `Contribution`."""


def change_norm(update: ClientUpdate, old: Weights) -> float:
    """The L2 norm of all that a client changed, as one vector."""
    parts = [(update.shared, old.shared), *((tensors, old.experts[key]) for key, tensors in update.experts.items())]
    return hypot(*(float(np.linalg.norm(_change(sent[name], start[name]))) for sent, start in parts for name in sent))


def clipped(update: ClientUpdate, old: Weights, norm: float, most: float) -> ClientUpdate:
    """Returns an update whose change is scaled down to a norm of `most`; the same one if `norm`, its own, is less."""
    if norm <= most:
        return update
    scale = most / norm

    def nearer(sent: Mapping[str, Array], start: Mapping[str, Array]) -> dict[str, Array]:
        return {
            name: (start[name] + scale * _change(value, start[name])).astype(value.dtype)
            for name, value in sent.items()
        }

    experts = {key: nearer(tensors, old.experts[key]) for key, tensors in update.experts.items()}
    return replace(update, experts=experts, shared=nearer(update.shared, old.shared))


def _change(value: Array, start: Array) -> FloatArray:
    change: FloatArray = value.astype(np.float64) - start
    return change


@dataclass
class RobustReducer(Reducer):
    """A `Reducer` by the rule of a configuration. Its memory is that of the round's updates, but for the mean's."""

    options: Robust = field(default_factory=Robust)
    clipped: int = 0
    """Clients whose change was scaled down."""
    withheld: frozenset[ExpertKey] = frozenset()
    """Experts that too few clients have trained, once there is a result."""
    _waiting: list[tuple[ClientUpdate, ExpertPlan, float]] = field(default_factory=list)
    """Updates until the median of their norms is known, and their norms."""
    _contributions: dict[_Group, list[_Part]] = field(default_factory=dict)
    _kept_share: dict[ExpertKey, float] = field(default_factory=dict)
    """How far an expert moves to what its contributors made of it, where the rule has an anchor."""
    _trainers: Counter[ExpertKey] = field(default_factory=Counter)
    _scale: float = 1.0
    """What the change of the update that is being folded was scaled down by."""

    def add(self, update: ClientUpdate, plan: ExpertPlan) -> frozenset[ExpertKey]:
        """See `Reducer.add`."""
        if self.options.clip_median is not None:
            self._waiting.append((update, plan, change_norm(update, self.old)))
            return frozenset(key for key in plan.trainable if self.rules.experts(update, plan, key) > 0.0)
        if self.options.clip is not None:
            return self._take(update, plan, change_norm(update, self.old), self.options.clip)
        return self._take(update, plan, 0.0, np.inf)

    def result(self) -> Weights:
        """See `Reducer.result`."""
        if self._waiting:
            middle = median(norm for _, _, norm in self._waiting)
            most = min(self.options.clip or np.inf, (self.options.clip_median or np.inf) * middle)
            for update, plan, norm in self._waiting:
                self._take(update, plan, norm, most)
            self._waiting = []
        few = self.options.min_contributors
        self.withheld = frozenset(key for key, count in self._trainers.items() if count < few)
        return super().result()

    @property
    def rows(self) -> dict[str, Array]:
        """See `Reducer.rows`."""
        averaged = dict(super().rows)
        for (owner, names), contributions in self._contributions.items():
            weights = np.stack([part.weight for part in contributions])
            if owner is None and weights.ndim == 2:
                any_row: Array = np.any(weights > 0.0, axis=0)
                averaged |= {name: any_row.copy() for name in names}
        for name, rows in averaged.items():
            rows[self._withheld_rows(name)] = False
        return averaged

    def told(self) -> dict[str, float]:
        """What a report says of it, once there is a result."""
        return {"clipped": float(self.clipped), "withheld": float(len(self.withheld))}

    def _take(self, update: ClientUpdate, plan: ExpertPlan, norm: float, most: float) -> frozenset[ExpertKey]:
        """Folds an update whose change has a norm, and must not have one above `most`."""
        self.clipped += norm > most
        self._scale = most / norm if norm > most else 1.0
        mine = super().add(clipped(update, self.old, norm, most), plan)
        self._trainers.update(mine & update.experts.keys())
        return mine

    def _hold_back(self) -> None:
        """See `Reducer._hold_back`: here by moving only part of the way."""
        if self.options.rule == "mean":
            super()._hold_back()
            return
        wanted = self.rules.anchor * self._clients
        self._kept_share = {key: count / wanted for key, count in self._participants.items() if count < wanted}

    def _fold(self, owner: ExpertKey | None, tensors: Mapping[str, Array], weight: float | FloatArray) -> None:
        if self.options.rule == "mean":
            super()._fold(owner, tensors, weight)
            return
        weights = np.asarray(weight, dtype=np.float64)
        if tensors and (weights > 0.0).any():
            # Sorted: a parsed update has its tensors in any order.
            part = _Part(tensors=tensors, weight=weights, scale=self._scale)
            self._contributions.setdefault((owner, tuple(sorted(tensors))), []).append(part)

    def _averaged(self, owner: ExpertKey | None, old: Mapping[str, Array]) -> dict[str, Array]:
        if owner in self.withheld:
            return dict(old)
        values = super()._averaged(owner, old)
        for (of, names), contributions in self._contributions.items():
            if of == owner:
                published = {name: old[name] for name in names}
                values |= self._together(owner, published, contributions)
        if owner is None and self.withheld:
            for name in values:
                rows = self._withheld_rows(name)
                if len(rows) and self._weighed_by_row(name):
                    values[name] = values[name].copy()
                    values[name][rows] = old[name][rows]
        return values

    def _together(
        self, owner: ExpertKey | None, published: Mapping[str, Array], contributions: Sequence[_Part]
    ) -> dict[str, Array]:
        """What a group's contributors made of it, together."""
        if contributions[0].weight.ndim:
            return {name: self._row_by_row(name, old, contributions) for name, old in published.items()}
        every = [
            Contribution(tensors=part.tensors, weight=float(part.weight), scale=part.scale) for part in contributions
        ]
        new = combined(every, published, self.options)
        share = 1.0 if owner is None else self._kept_share.get(owner, 1.0)
        if share < 1.0:
            for name, old in published.items():
                new[name] = (old + share * _change(new[name], old)).astype(old.dtype)
        return new

    def _row_by_row(self, name: str, old: Array, contributions: Sequence[_Part]) -> Array:
        new = old.copy()
        for row in range(len(old)):
            every = [
                Contribution(tensors={name: part.tensors[name][row]}, weight=float(part.weight[row]), scale=part.scale)
                for part in contributions
                if part.weight[row] > 0.0
            ]
            if every:
                new[row] = combined(every, {name: old[row]}, self.options)[name]
        return new

    def _weighed_by_row(self, name: str) -> bool:
        if (None, name) in self._means:
            return self._means[None, name].weight.ndim == 1
        return any(part.weight.ndim == 1 for part in self._contributions.get((None, (name,)), ()))

    def _withheld_rows(self, name: str) -> list[int]:
        """Rows of a router that belong to experts which too few have trained."""
        layer = self.router_layers.get(name)
        return [key.expert for key in self.withheld if key.layer == layer]


class RobustMeanOutputs(MeanOutputs):
    """Mean outputs by the same rule, each client weighing the tokens behind its own."""

    def __init__(self, options: Robust) -> None:
        """Starts empty."""
        super().__init__()
        self._options = options
        self._kept: dict[ExpertKey, list[Contribution]] = {}

    def add(self, update: ClientUpdate) -> None:
        """See `MeanOutputs.add`."""
        for key, (mean, tokens) in update.means.items():
            if tokens:
                self._kept.setdefault(key, []).append(Contribution(tensors={"mean": mean}, weight=float(tokens)))

    def result(self, old: Array | None) -> Array | None:
        """See `MeanOutputs.result`; of what too few have measured, too, the old ones."""
        if old is None or not self._kept:
            return old
        means = old.copy()
        for key, contributions in self._kept.items():
            if len(contributions) >= self._options.min_contributors:
                means[key] = combined(contributions, {"mean": means[key]}, self._options)["mean"]
        return means


class RobustClassMeans(ClassMeans):
    """The task head of class prototypes, each class's mean feature by the same rule, clients weighing their examples.

    As a plain sum one client that lies about its features decides the head that every round starts from. A class that
    too few clients have counts as one that nobody has.
    """

    def __init__(self, options: Robust) -> None:
        """Starts empty."""
        super().__init__()
        self._options = options
        self._kept: list[Prototypes] = []

    def add(self, prototypes: Prototypes) -> None:
        """See `ClassMeans.add`."""
        super().add(prototypes)
        self._kept.append(prototypes)

    def head(self, weight: Array, bias: Array) -> tuple[Array, Array]:
        """See `ClassMeans.head`."""
        if self._sums is not None:
            origin = {"mean": np.zeros(self._sums.shape[1])}
            for label in np.flatnonzero(self._counts > 0):
                own = [(one.sums[label].astype(np.float64), float(one.counts[label])) for one in self._kept]
                means = [Contribution(tensors={"mean": total / n}, weight=n) for total, n in own if n > 0]
                if len(means) < self._options.min_contributors:
                    self._sums[label] = self._counts[label] = 0.0
                else:
                    self._sums[label] = combined(means, origin, self._options)["mean"] * self._counts[label]
        return super().head(weight, bias)


def mean_outputs(options: Robust) -> MeanOutputs:
    """What a round's mean outputs are folded by."""
    return RobustMeanOutputs(options) if options.compares else MeanOutputs()


def class_means(options: Robust) -> ClassMeans:
    """What clients' class prototypes are folded by."""
    return RobustClassMeans(options) if options.compares else ClassMeans()
