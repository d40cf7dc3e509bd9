"""Who holds which experts, decided for a whole cohort at once: a linear program (FLEX-MoE, arXiv 2512.23070).

    maximise    sum_ce Q[c, e] x[c, e]          over 0 <= x <= 1
    subject to  sum_e x[c, e] = k_c             every client holds exactly its budget
                sum_{e in l} x[c, e] >= m_cl    and at least so many experts in each layer (ours)
                lower_e <= sum_c x[c, e] <= upper_e

No integer programming is needed. The rows of the clients are a laminar family of sets of variables: a client's layers
are disjoint and lie within the client, so the row for each layer costs nothing. The rows of the experts are another:
they are disjoint. A 0/1 matrix whose rows are two laminar families is totally unimodular (Edmonds), and slack columns
keep it so. With integers on the right every vertex is integral, and the dual simplex of HiGHS ends in a vertex.

Bounds that cannot all be kept are kept as nearly as possible: a missing or surplus holder costs more than any exchange
of experts between clients could gain, so as few as possible are missing, and among those solutions the fitness is
largest. How many are is part of the answer (ours).

Ties. The program is set up in ascending order of clients, so the order in which they are given cannot matter. Q gets a
small perturbation, drawn for (run seed, round, client, layer, expert), so that of equally good experts each client
takes others: without it, in a first round in which nobody knows anything, HiGHS would decide. It never reorders two
unequal values of Q, so without bounds every client holds its best experts exactly (ours).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hfedmoe_ray.seeds import generator
from hfedmoe_ray.strategies.scores import Scope, mask
from hfedmoe_ray.types import Array, ClientUpdate, ExpertKey, ExpertPlan, FloatArray

TIE = 1e-3
"""Largest perturbation of Q, where the spread of all Q is 1: assignments whose mean Q per expert held differs by less
are equally good. A smaller one makes the simplex slow where most of Q is tied: at 1e-6, 16 s instead of
0.2 for 50 clients of 1024 experts."""
_ROUNDING = 1e-9
"""What a bound may lie above an integer, or below, and still be taken for it."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """Who holds what, and which bounds it does not keep."""

    chosen: Mapping[int, frozenset[ExpertKey]]
    """Experts of each client, in ascending order of clients."""
    missing: Array
    """Holders that each expert has less than its lower bound, int [L, E]."""
    surplus: Array
    """Holders that each expert has more than its upper bound, int [L, E]."""

    @property
    def relaxed(self) -> int:
        """By how many holders bounds were relaxed, over all experts."""
        return int(self.missing.sum() + self.surplus.sum())

    def event(self, round: int) -> dict[str, Any]:
        """Fields of the event `bounds_relaxed`."""
        reason = (
            f"The clients' budgets do not allow the asked number of holders of every expert: {int(self.missing.sum())} "
            f"too few in {int((self.missing > 0).sum())} experts, {int(self.surplus.sum())} too many in "
            f"{int((self.surplus > 0).sum())}. As few as possible; later rounds make up for it."
        )
        return {
            "round": round,
            "missing": int(self.missing.sum()),
            "surplus": int(self.surplus.sum()),
            "reason": reason,
        }


def layer_minimum(budget: int, shape: tuple[int, int], scope: Scope) -> Array:
    """Returns how many experts a client must hold in each layer, int [L], as `top_experts` reads the scope.

    "global": one, as a layer without any would pass nothing on (none where the budget is below the number of layers);
    "per_layer": its equal share of the budget, which then leaves nothing to place freely.
    """
    layers, experts = shape
    if scope == "global":
        return np.full(layers, int(budget >= layers), dtype=np.int64)
    share, rest = divmod(budget, layers)
    minimum: Array = np.minimum(share + (np.arange(layers) < rest), experts)
    return minimum


def assign(
    fitness: Mapping[int, FloatArray],
    budgets: Mapping[int, int],
    *,
    scope: Scope,
    seed: int,
    round: int,
    lower: FloatArray | None = None,
    upper: FloatArray | None = None,
    fixed: Mapping[int, frozenset[ExpertKey]] | None = None,
) -> Assignment:
    """Solves the program of this module.

    Measured on one core: 20 clients of 48 experts take 7 ms, 50 of 1024 take 0.2-0.4 s, 500 of 1024 take 3-18 s.

    Args:
        fitness: Q of every client, [L, E] each.
        budgets: k_c: how many experts each client holds.
        scope: How a budget is spread over layers (`layer_minimum`).
        seed: Of the run; with `round`, what ties are broken by.
        round: The round that is planned.
        lower: Fewest holders of each expert, [L, E]; rounded down. None: no bound.
        upper: Most holders of each expert, [L, E]; rounded up. None: no bound.
        fixed: Experts that clients hold in any case, within their budgets.

    Raises:
        ValueError: A client's own demands contradict each other: its budget is above L E, or below what is fixed.
    """
    clients = sorted(fitness)
    first = fitness[clients[0]]
    layers, experts = shape = (first.shape[0], first.shape[1])
    held = np.stack([mask(shape, frozenset() if fixed is None else fixed.get(c, frozenset())) for c in clients])
    minimum = np.stack([layer_minimum(budgets[c], shape, scope) for c in clients])  # [C, L]
    budget = np.array([budgets[c] for c in clients])
    needed = np.maximum(minimum, held.sum(axis=2)).sum(axis=1)
    for client, own, fewest in zip(clients, budget, needed, strict=True):
        if not fewest <= own <= layers * experts:
            raise ValueError(f"client {client} is to hold {own} of {layers * experts} experts, and at least {fewest}")
    # There are no more holders than clients, and no fewer than none.
    least = np.zeros(shape) if lower is None else np.floor(lower + _ROUNDING).clip(0, len(clients))
    most = np.full(shape, np.inf) if upper is None else np.ceil(upper - _ROUNDING).clip(0, None)

    draws = np.stack([generator(seed, "ties", round, client).random(shape) for client in clients])
    untied = _untied(np.stack([fitness[c] for c in clients]).astype(np.float64), draws)
    holds = _solve(untied, budget=budget, minimum=minimum, lower=least, upper=most, held=held)
    holders = holds.sum(axis=0)
    return Assignment(
        chosen={
            client: frozenset(ExpertKey(int(layer), int(expert)) for layer, expert in np.argwhere(own))
            for client, own in zip(clients, holds, strict=True)
        },
        missing=np.maximum(least - holders, 0).astype(np.int64),
        surplus=np.maximum(holders - most, 0).astype(np.int64),
    )


def _untied(fitness: FloatArray, draws: FloatArray) -> FloatArray:
    """Scales Q to 0..1 and adds `draws` (of 0..1) times `TIE`, or half the gap to the next value where that is less."""
    values, position = np.unique(fitness, return_inverse=True)
    values = (values - values[0]) / (float(values[-1] - values[0]) or 1.0)
    room = np.append(np.minimum(np.diff(values) / 2, TIE), TIE)
    position = position.reshape(fitness.shape)
    untied: FloatArray = values[position] + room[position] * draws
    return untied


def _solve(
    fitness: FloatArray, *, budget: Array, minimum: Array, lower: FloatArray, upper: FloatArray, held: Array
) -> Array:
    """Returns x, bool [C, L, E], of a fitness within 0..1 + `TIE` and demands in whole numbers."""
    # Here, as every client's process imports strategies and none of them assigns: scipy.optimize takes 35 MiB.
    from scipy.optimize import linprog
    from scipy.sparse import block_array, eye_array, kron

    clients, layers, experts = fitness.shape
    total = layers * experts
    by_client = kron(eye_array(clients), np.ones((1, total)), format="csr")
    by_layer = kron(eye_array(clients * layers), np.ones((1, experts)), format="csr")
    by_expert, slack = kron(np.ones((1, clients)), eye_array(total), format="csr"), eye_array(total, format="csr")
    # Rows nothing could break only cost time.
    below, above = np.flatnonzero(lower > 0), np.flatnonzero(upper < clients)
    layered = np.flatnonzero(minimum > 0)
    # Columns: x [C L E], holders missing [L E], holders in surplus [L E]. Every row reads <=.
    rows = [
        [-by_expert[below], -slack[below], None],
        [by_expert[above], None, -slack[above]],
        [-by_layer[layered], None, None],
    ]
    demands = [-lower.ravel()[below], upper.ravel()[above], -minimum.ravel()[layered]]
    # An exchange passes each expert at most once, and gains at most 1 + TIE there.
    price = np.full(2 * total, 2.0 * (total + 1))
    ranges = np.zeros((fitness.size + 2 * total, 2))
    ranges[: fitness.size, 0], ranges[: fitness.size, 1], ranges[fitness.size :, 1] = held.ravel(), 1.0, np.inf
    by_client.resize((clients, len(ranges)))
    result = linprog(
        np.concatenate([-fitness.ravel(), price]),
        A_ub=block_array(rows, format="csr"),
        b_ub=np.concatenate(demands),
        A_eq=by_client,
        b_eq=budget,
        bounds=ranges,
        method="highs-ds",
    )
    if result.status != 0:
        raise RuntimeError(f"HiGHS did not solve the assignment of {clients} clients: {result.message}")
    solution: FloatArray = result.x[: fitness.size]
    whole = np.rint(solution)
    if np.abs(solution - whole).max() > 1e-6:
        raise RuntimeError("HiGHS returned a fractional assignment, though every vertex of the program is integral")
    holds: Array = (whole > 0).reshape(fitness.shape)
    return holds


# ------------------------------------------------------------------------------------------ loads over the rounds


def mean_holders(budgets: Mapping[int, int], shape: tuple[int, int]) -> float:
    """T = sum k_c / (L E): how many of the clients hold an expert on average."""
    return sum(budgets.values()) / (shape[0] * shape[1])


def count_holders(
    counts: Array | None, shape: tuple[int, int], updates: Mapping[int, ClientUpdate], plans: Mapping[int, ExpertPlan]
) -> Array:
    """Adds a round to how many clients have held each expert, int64 [L, E].

    Only clients whose update was accepted count: what the others held was not trained for anyone.
    """
    total: Array = np.zeros(shape, dtype=np.int64) if counts is None else counts.copy()
    for client in updates:
        total += mask(shape, plans[client].trainable)
    return total
