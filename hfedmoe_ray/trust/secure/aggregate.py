"""The sum of a round's vectors, read as averages: all that the server knows of its clients' updates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hfedmoe_ray.strategies.rules import RuleSet
from hfedmoe_ray.trust.secure.layout import Layout, Part
from hfedmoe_ray.types import Array, ExpertKey, FloatArray, Weights


@dataclass(frozen=True, kw_only=True)
class Aggregate:
    """What the server knows after a round: sums over all clients."""

    layout: Layout
    common: Mapping[str, FloatArray]
    experts: Mapping[ExpertKey, Mapping[str, FloatArray]]

    def averaged(self, old: Weights, rules: RuleSet, clients: int, fewest: int) -> tuple[Weights, dict[str, Array]]:
        """Returns the averaged weights, and of routers of which only some rows were averaged, which.

        What nobody contributed to is the very same array as before (see `Reducer.result`).

        Args:
            old: The published weights.
            rules: The run's.
            clients: Whose vectors are in the sum.
            fewest: Experts in which fewer clients took part keep their value.
        """
        wanted = rules.anchor * clients
        experts = dict(old.experts)
        for key, found in self.experts.items():
            count = self.count(key)
            if count < fewest:
                continue
            weight = found["w"][()] * max(1.0, wanted / count)
            experts[key] = {
                name: _moved(value, found[f"change {name}"], weight) for name, value in old.experts[key].items()
            }
        rows = self.common["w routers"]
        partial: dict[str, Array] = {}
        shared = dict(old.shared)
        for name, value in old.shared.items():
            total = self.common[f"shared {name}"]
            if name not in self.layout.routers:
                shared[name] = _moved(value, total, self.common["w shared"][()])
                continue
            layer = self.layout.routers[name]
            weights = self.layout.along(name, value, rows)
            shared[name] = _moved(value, total, weights, self._literal(rules, layer))
            if 0 < np.count_nonzero(rows[layer]) < len(rows[layer]):
                partial[name] = rows[layer] > 0
        return replace(old, version=old.version + 1, shared=shared, experts=experts), partial

    def means(self, old: Array | None) -> Array | None:
        """The new mean outputs [L, E, H]; those that nobody measured as they were."""
        if old is None or "means" not in self.common:
            return old
        behind = self.common["means behind"]
        new, measured = old.copy(), behind > 0
        new[measured] = (self.common["means"][measured] / behind[measured][:, None]).astype(old.dtype)
        return new

    def count(self, key: ExpertKey) -> int:
        """Clients that took part in an expert."""
        return round(float(self.experts[key]["taking part"])) if key in self.experts else 0

    @property
    def counts(self) -> dict[ExpertKey, int]:
        """Of every expert that somebody took part in, how many."""
        return {key: self.count(key) for key in self.experts if self.count(key)}

    @property
    def usage(self) -> FloatArray | None:
        """Mean gate value of each expert over all tokens, [L, E]; None where profiles were not summed."""
        tokens = float(self.common["tokens"]) if "tokens" in self.common else 0.0
        return self.common["usage"] / tokens if tokens else None

    @property
    def loss(self) -> float | None:
        """Mean of the clients' losses."""
        known = float(self.common["losses"])
        return float(self.common["loss"]) / known if known else None

    @property
    def clipped(self) -> int:
        """Numbers that were clipped."""
        return round(float(self.common["clipped"]))

    def _literal(self, rules: RuleSet, layer: int) -> float | None:
        """|S_global| of eq. 20, where routers are averaged as it is printed."""
        return float(sum(key.layer == layer for key in self.counts)) or None if rules.literal_router else None


def read_sums(layout: Layout, sums: Sequence[Array]) -> Aggregate:
    """Reads the sums of all blocks of a layout."""
    blocks = zip(layout.experts.items(), sums[1:], strict=True)
    return Aggregate(
        layout=layout,
        common=_decoded(layout.common, sums[0]),
        experts={key: _decoded(parts, block) for (key, parts), block in blocks},
    )


def _moved(old: Array, total: FloatArray, weight: float | Array, divisor: float | None = None) -> Array:
    """Returns old + sum(w change) / sum(w), or sum(w value) / divisor; where no weight is, the old values.

    Args:
        old: Published.
        total: sum(w change).
        weight: sum(w): a number, or one for each row.
        divisor: In place of sum(w).
    """
    weights = np.asarray(weight, dtype=np.float64)
    if not (weights > 0).any():
        return old
    wide = old.astype(np.float64)
    safe = np.where(weights > 0, weights, 1.0)
    new = wide + total / safe if divisor is None else (wide * weights + total) / divisor
    return np.asarray(np.where(weights > 0, new, wide).astype(old.dtype))


def _decoded(parts: Sequence[Part], block: Array) -> dict[str, FloatArray]:
    found, start = {}, 0
    for part in parts:
        found[part.name] = part.form.decode(block[start : start + part.size]).reshape(part.shape)
        start += part.size
    return found
