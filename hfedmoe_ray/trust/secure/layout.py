"""An update as a vector of a ring.

A vector has a block that all clients add to, and one for each expert:

    all         of every router and shared parameter w * change; w of routers [L, E] and of the rest [1]
                of mean outputs tokens * mean [L, E, H], tokens [L, E]
                of the routing profile tokens * usage [L, E], tokens [1]
                loss [1] and how many know theirs [1]; how many numbers were clipped [1]
    an expert   w * change of each of its tensors, w [1], and 1 for each client with w > 0

Before that, one block with the last of these of every expert is added up: experts of which the sum would be that of too
few clients are then left out.

w is what the strategy's own rules make of the client's update, computed by the client. Where the variant is "padded"
the blocks of all experts belong to all clients; where it is "grouped", to those whose plans let them train the expert.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hfedmoe_ray.config.secure import Secure
from hfedmoe_ray.strategies.rules import GateWeights, RuleSet, UsageWeighted, WithTheirExpert, uniform
from hfedmoe_ray.trust.secure.fixed_point import FixedPoint
from hfedmoe_ray.trust.secure.session import Block
from hfedmoe_ray.types import Array, ClientUpdate, ExpertKey, ExpertPlan, FloatArray, TaskWeights, Weights

_LOSS = 1e3
"""Larger losses count as this."""
_MEAN = 1e2
"""Larger numbers of a mean output count as this."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Numbers of one meaning, one after the other."""

    name: str
    shape: tuple[int, ...]
    form: FixedPoint

    @property
    def size(self) -> int:
        """Numbers."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where everything is in a round's vectors. The same value for the server and all clients."""

    clients: tuple[int, ...]
    """Who may take part."""
    common: tuple[Part, ...]
    experts: Mapping[ExpertKey, tuple[Part, ...]]
    holders: Mapping[ExpertKey, frozenset[int]]
    """Of every expert that is aggregated, the clients whose plans let them train it."""
    padded: bool
    routers: Mapping[str, int]
    """Router parameter name -> its MoE layer."""
    shape: tuple[int, int]
    """(L, E)."""
    max_samples: int
    max_tokens: int

    def blocks(self) -> list[Block]:
        """The blocks, in their order."""
        everyone = frozenset(self.clients)
        blocks = [Block(size=_size(self.common), members=everyone)]
        for key, parts in self.experts.items():
            blocks.append(Block(size=_size(parts), members=everyone if self.padded else self.holders[key]))
        return blocks

    def among(self, present: Sequence[int], fewest: int) -> "Layout":
        """The layout for those who are left, without experts that fewer than so many of them hold."""
        there = frozenset(present)
        holders = {key: held & there for key, held in self.holders.items() if len(held & there) >= fewest}
        experts = {key: parts for key, parts in self.experts.items() if key in holders}
        return replace(self, clients=tuple(present), holders=holders, experts=experts)

    def presence(self) -> list[Block]:
        """The one block of the first sum: how many take part in each expert."""
        return [Block(size=len(self.experts), members=frozenset(self.clients))]

    def only(self, keys: Collection[ExpertKey]) -> "Layout":
        """The layout without all other experts."""
        return replace(self, experts={key: parts for key, parts in self.experts.items() if key in keys})

    # ------------------------------------------------------------------------------------------------ on the client

    def takes_part(self, values: Sequence[Array]) -> Array:
        """What a client adds to the first sum, from what it adds to the second (`encode`)."""
        return np.array([block[-1] if len(block) else 0 for block in values[1:]], dtype=values[0].dtype)

    def chosen(self, values: Sequence[Array], among: "Layout") -> list[Array]:
        """Returns the blocks of this layout, of all those of another that it is a part of."""
        of = dict(zip(among.experts, values[1:], strict=True))
        return [values[0], *(of[key] for key in self.experts)]

    def encode(
        self, update: ClientUpdate, plan: ExpertPlan, start: TaskWeights, rules: RuleSet, loss: float
    ) -> list[Array]:
        """Returns what a client adds, by block; empty for blocks it is no member of.

        Args:
            update: What it has trained and measured.
            plan: What it was to do.
            start: The published weights it started from.
            rules: The run's.
            loss: Its mean loss.

        Raises:
            ValueError: A number is not finite, or a tensor not what is published.
        """
        weights = {key: self._weight(rules.experts(update, plan, key)) for key in plan.trainable}
        values = self._common(update, start, rules.routers(update, plan, self.shape[0]), rules.shared(update), loss)
        blocks, clipped = _encoded(self.common, values)
        everything = [blocks]
        for key, parts in self.experts.items():
            if not self.padded and update.client not in self.holders[key]:
                everything.append(np.zeros(0, blocks.dtype))
                continue
            # An expert that takes part without having moved counts with its published value: a change of nothing.
            moved = update.experts.get(key, {}) if weights.get(key) else {}
            mine = {
                f"change {name}": _change(value, start.experts[key][name], weights[key])
                for name, value in moved.items()
            }
            mine |= {"w": np.array(weights.get(key, 0.0)), "taking part": np.array(float(weights.get(key, 0.0) > 0))}
            block, more = _encoded(parts, mine)
            everything.append(block)
            clipped += more
        last = self.common[-1]
        everything[0][-1:] = last.form.encode(np.array([float(clipped)]))[0]
        return everything

    def _weight(self, weight: float) -> float:
        return float(min(max(weight, 0.0), self.max_samples))

    def _common(
        self, update: ClientUpdate, start: TaskWeights, routers: FloatArray, shared: float, loss: float
    ) -> dict[str, Array]:
        rows = np.clip(routers, 0.0, self.max_samples)
        rows = np.broadcast_to(rows if rows.ndim == 2 else rows[:, None], self.shape)
        weight = self._weight(shared)
        values: dict[str, Array] = {"w routers": rows, "w shared": np.array(weight)}
        for name, value in update.shared.items():
            by = self.along(name, value, rows) if name in self.routers else weight
            values[f"shared {name}"] = _change(value, start.shared[name], by)
        if update.profile is not None:
            tokens = float(min(update.profile.tokens, self.max_tokens))
            values |= {"usage": update.profile.usage * tokens, "tokens": np.array(tokens)}
        if update.means and any(part.name == "means" for part in self.common):
            counts = np.zeros(self.shape)
            means = np.zeros(next(part.shape for part in self.common if part.name == "means"))
            for key, (mean, behind) in update.means.items():
                counts[key] = min(behind, self.max_tokens)
                means[key] = np.clip(mean, -_MEAN, _MEAN) * counts[key]
            values |= {"means": means, "means behind": counts}
        if math.isfinite(loss):
            values |= {"loss": np.array(loss), "losses": np.array(1.0)}
        return values

    def along(self, name: str, value: Array, rows: FloatArray) -> Array:
        """Weights of routers, [L, E], in a shape that multiplies one of them: by row where it has one for each expert.

        Args:
            name: The router's.
            value: The router.
            rows: Weights of all rows of all routers.

        Raises:
            ValueError: Its rows are not those of experts, but are to weigh differently.
        """
        own = rows[self.routers[name]]
        if value.shape[:1] == own.shape:
            rows_of: Array = own.reshape(-1, *(1,) * (value.ndim - 1))
            return rows_of
        if (own != own[0]).any():
            raise ValueError(f"router parameter {name} has no row for each expert, which its rule weighs one by one")
        return np.asarray(own[0])

    # ------------------------------------------------------------------------------------------------ on the server

    def counted(self, total: Array) -> dict[ExpertKey, int]:
        """Reads the first sum."""
        forms = (parts[-1].form for parts in self.experts.values())
        counts = (form.decode(total[place : place + 1])[0] for place, form in enumerate(forms))
        return {key: round(float(count)) for key, count in zip(self.experts, counts, strict=True)}


def make_layout(
    secure: Secure,
    rules: RuleSet,
    weights: Weights,
    plans: Mapping[int, ExpertPlan],
    *,
    routers: Mapping[str, int],
    shape: tuple[int, int],
    max_tokens: int,
) -> Layout:
    """Returns the layout of a round.

    Args:
        secure: The run's options.
        rules: How updates are weighed.
        weights: The published weights.
        plans: What each client is to do.
        routers: Router parameter name -> its MoE layer.
        shape: (L, E).
        max_tokens: Most tokens of a client in a round.
    """
    samples, numbers = float(secure.max_samples), sum(value.size for _, value in _all(weights))

    def part(name: str, like: Sequence[int], bound: float) -> Part:
        form = FixedPoint(ring=secure.ring, clients=max(len(plans), 2), bound=bound)
        return Part(name=name, shape=tuple(like), form=form)

    of_experts = _bound(rules.experts, samples)
    of_routers = 1.0 if isinstance(rules.routers, GateWeights) else samples
    if isinstance(rules.routers, WithTheirExpert):
        of_routers = of_experts
    of_shared = _bound(rules.shared, samples)
    common = [part("w routers", shape, of_routers), part("w shared", (), of_shared)]
    for name, value in weights.shared.items():
        weight = of_routers if name in routers else of_shared
        common.append(part(f"shared {name}", value.shape, weight * secure.clip))
    if secure.profiles == "aggregate":
        common += [part("usage", shape, max_tokens), part("tokens", (), max_tokens)]
    if weights.means is not None:
        common += [
            part("means", weights.means.shape, max_tokens * _MEAN),
            part("means behind", shape, max_tokens),
        ]
    common += [part("loss", (), _LOSS), part("losses", (), 1.0), part("clipped", (), float(numbers))]
    holders = {key: frozenset(c for c, plan in plans.items() if key in plan.trainable) for key in weights.experts}
    alike: dict[tuple[tuple[str, tuple[int, ...]], ...], tuple[Part, ...]] = {}

    def expert(tensors: Mapping[str, Array]) -> tuple[Part, ...]:
        """The parts of an expert: one value for all alike, so that a message holds it once."""
        shapes = tuple((name, value.shape) for name, value in tensors.items())
        if shapes not in alike:
            changes = (part(f"change {name}", like, of_experts * secure.clip) for name, like in shapes)
            alike[shapes] = (*changes, part("w", (), of_experts), part("taking part", (), 1.0))
        return alike[shapes]

    experts = {key: expert(tensors) for key, tensors in weights.experts.items()}
    return Layout(
        clients=tuple(sorted(plans)),
        common=tuple(common),
        experts=experts,
        holders=holders,
        padded=secure.variant == "padded",
        routers=dict(routers),
        shape=shape,
        max_samples=secure.max_samples,
        max_tokens=max_tokens,
    )


def _bound(rule: Callable[..., Any], samples: float) -> float:
    """Largest weight that a rule can give: shares of use are at most 1, all others are counts of examples."""
    return 1.0 if isinstance(rule, UsageWeighted) or rule is uniform else samples


def _all(weights: Weights) -> Iterator[tuple[str, Array]]:
    yield from weights.shared.items()
    for tensors in weights.experts.values():
        yield from tensors.items()


def _size(parts: Sequence[Part]) -> int:
    return sum(part.size for part in parts)


def _change(value: Array, start: Array, weight: float | Array) -> Array:
    """Returns w * change; the change as fp32, in which it was trained."""
    if value.shape != start.shape:
        raise ValueError(f"a tensor of {list(value.shape)} where {list(start.shape)} is published")
    return np.subtract(value, start, dtype=np.float32).astype(np.float64) * weight


def _encoded(parts: Sequence[Part], values: Mapping[str, Array]) -> tuple[Array, int]:
    """Numbers of the ring for all parts, zeros where there is no value; and how many values were clipped."""
    unknown = values.keys() - {part.name for part in parts}
    if unknown - {"usage", "tokens"}:  # which the server may be told in the clear
        raise ValueError(f"there is no place for {', '.join(sorted(unknown))}")
    arrays, clipped = [], 0
    for part in parts:
        value = values.get(part.name)
        if value is not None and value.shape != part.shape:
            raise ValueError(f"{part.name} is {list(value.shape)}, expected {list(part.shape)}")
        array, more = part.form.encode(np.zeros(part.size) if value is None else value.reshape(-1))
        arrays.append(array)
        clipped += more
    return np.concatenate(arrays), clipped
