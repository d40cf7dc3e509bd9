"""Choosing experts under a budget: eq. 15 of arXiv 2601.00583 and its controls, as pure functions of arrays.

Everything is [L, E] float64. Ties are broken by (layer, expert), so a choice never depends on a sorting algorithm.
"""

from typing import Literal

import numpy as np

from hfedmoe_ray.types import Array, ExpertKey, ExpertPlan, FloatArray, HeldAs, Role

Scope = Literal["global", "per_layer"]
Unselected = Literal["frozen", "mean", "drop", "reroute"]


def top_experts(score: FloatArray, allowed: Array, budget: int, scope: Scope) -> frozenset[ExpertKey]:
    """Returns the experts of highest total score within a budget (eq. 15).

    Args:
        score: Score of every expert, [L, E].
        allowed: Which experts may be chosen, bool [L, E].
        budget: Most experts to choose, over all layers.
        scope: "global" spends the budget over all layers together, after the best expert of each layer (ours: a
            layer without any expert would pass nothing on); "per_layer" gives every layer an equal share of it,
            the remainder to the lower layers.
    """
    layers = score.shape[0]
    ranked = [
        [ExpertKey(layer, int(e)) for e in np.argsort(-score[layer], kind="stable") if allowed[layer, e]]
        for layer in range(layers)
    ]
    if scope == "per_layer":
        share, rest = divmod(budget, layers)
        return frozenset(key for layer, row in enumerate(ranked) for key in row[: share + (layer < rest)])
    by_score = sorted((key for row in ranked for key in row), key=lambda key: (-score[key], key))
    firsts = sorted((row[0] for row in ranked if row), key=lambda key: (-score[key], key))[:budget]
    others = [key for key in by_score if key not in firsts]
    return frozenset(firsts + others[: budget - len(firsts)])


def explore(
    chosen: frozenset[ExpertKey], score: FloatArray, share: float, rng: np.random.Generator
) -> frozenset[ExpertKey]:
    """Replaces a share of a choice, lowest scores first, by random experts of the same layer (ours).

    The share is met on average: 10 % of six experts is one expert in six rounds out of ten. A replacement comes from
    the same layer, so no layer is emptied.
    """
    count = int(share * len(chosen) + rng.random())
    result = set(chosen)
    for key in sorted(chosen, key=lambda key: (score[key], key))[:count]:
        rest = [e for e in range(score.shape[1]) if ExpertKey(key.layer, e) not in result]
        if rest:
            result.remove(key)
            result.add(ExpertKey(key.layer, int(rng.choice(rest))))
    return frozenset(result)


def resident_plan(
    shape: tuple[int, int], chosen: frozenset[ExpertKey], unselected: Unselected, batch_budget: int | None
) -> ExpertPlan:
    """Returns the plan of a client that trains `chosen`; the others are FROZEN, or ABSENT with a stand-in."""
    other = Role.FROZEN if unselected == "frozen" else Role.ABSENT
    layers, experts = shape
    return ExpertPlan(
        roles=tuple(
            tuple(Role.TRAIN if ExpertKey(layer, e) in chosen else other for e in range(experts))
            for layer in range(layers)
        ),
        absent="mean" if unselected == "frozen" else unselected,
        batch_budget=batch_budget,
    )


def uniform_plan(
    shape: tuple[int, int], role: Role, batch_budget: int | None = None, *, frozen_as: HeldAs = "exact"
) -> ExpertPlan:
    """Returns a plan in which every expert has the same role."""
    layers, experts = shape
    return ExpertPlan(roles=((role,) * experts,) * layers, batch_budget=batch_budget, frozen_as=frozen_as)


def mask(shape: tuple[int, int], keys: frozenset[ExpertKey] | tuple[ExpertKey, ...]) -> Array:
    """Returns a bool [L, E] array that is True at `keys`."""
    result = np.zeros(shape, dtype=bool)
    for key in keys:
        result[key] = True
    return result
