"""Who gets which examples: pure, seeded rules that deal every example to exactly one client.

A part is an increasing array of row numbers. Legend: N examples, C clients, K classes.
"""

from collections.abc import Sequence

import numpy as np

from hfedmoe_ray.config.data import Partition
from hfedmoe_ray.data.labels import IntArray
from hfedmoe_ray.errors import DataError
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.types import FloatArray

Parts = list[IntArray]

_DRAWS = 20
"""Times a random partition is drawn anew before a draw that leaves clients short is repaired."""


def deal(partition: Partition, labels: IntArray, groups: Sequence[str] | None, clients: int, seed: int) -> Parts:
    """Deals the examples to the clients as configured, at least `min_examples` to each.

    A random draw that leaves a client short is repeated up to 20 times; the last one is then repaired by moving
    examples, one at a time and at random, from whoever has most. A natural partition is never drawn nor repaired.

    Args:
        partition: The rule; every rule but `files`, under which clients bring their own examples.
        labels: Class numbers [N].
        groups: Value of the natural key per example [N], or None.
        clients: C.
        seed: Run seed.

    Returns:
        C increasing arrays that together hold 0..N-1 exactly once.

    Raises:
        DataError: the examples, or the groups, are too few for the clients.
    """
    least = partition.min_examples
    if len(labels) < clients * least:
        served = len(labels) // least
        raise DataError(
            f"data.partition: {len(labels)} training examples cannot give {clients} clients {least} each "
            f"(min_examples): {_these(range(served, clients))} would go short. Give more examples (data.max_examples), "
            f"or lower data.partition.min_examples, or clients.count{f' to at most {served}' if served else ''}."
        )
    if partition.how == "natural":
        if groups is None:
            raise ValueError("a natural partition needs the groups of the examples")
        return _checked_natural(partition, groups, clients)
    for attempt in range(_DRAWS):
        rng = generator(seed, "partition", attempt)
        match partition.how:
            case "iid":
                parts = iid(len(labels), clients, rng)
            case "dirichlet":
                parts = dirichlet(labels, clients, partition.alpha, rng)
            case "shards":
                parts = shards(labels, clients, partition.shards_per_client, rng)
            case "quantity":
                parts = quantity(labels, clients, partition.alpha, rng)
            case "files":
                raise ValueError("clients that read their own files are dealt nothing")
        if min(map(len, parts)) >= least:
            return parts
    return repair(parts, least, generator(seed, "partition-repair"))


# --------------------------------------------------------------------------------------------------------- rules


def iid(examples: int, clients: int, rng: np.random.Generator) -> Parts:
    """Deals 0..N-1 at random, in sizes that differ by at most one."""
    return [np.sort(part) for part in np.array_split(rng.permutation(examples), clients)]


def dirichlet(labels: IntArray, clients: int, alpha: float, rng: np.random.Generator) -> Parts:
    """Deals each class over the clients in shares drawn from Dir(alpha) (Yurochkin et al., arXiv 1905.12022).

    alpha -> 0 gives each class to one client; alpha -> infinity deals alike. Sizes differ as they fall.
    """
    hands: list[list[IntArray]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(clients, alpha))
        for hand, rows_of_client in zip(hands, np.split(rows, _cuts(shares, len(rows))), strict=True):
            hand.append(rows_of_client)
    return [np.sort(np.concatenate(hand)) for hand in hands]


def shards(labels: IntArray, clients: int, shards_per_client: int, rng: np.random.Generator) -> Parts:
    """Sorts by label, cuts into equal shards and gives each client so many (McMahan et al., arXiv 1602.05629)."""
    shuffled = rng.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    pieces = np.array_split(by_label, clients * shards_per_client)
    order = rng.permutation(len(pieces)).reshape(clients, shards_per_client)
    return [np.sort(np.concatenate([pieces[piece] for piece in row])) for row in order]


def quantity(labels: IntArray, clients: int, alpha: float, rng: np.random.Generator) -> Parts:
    """Draws the clients' sizes from Dir(alpha) and gives each the label shares of the whole, up to rounding (ours)."""
    order = stratified_order(labels, rng)
    shares = rng.dirichlet(np.full(clients, alpha))
    return [np.sort(part) for part in np.split(order, _cuts(shares, len(order)))]


def natural(groups: Sequence[str], clients: int) -> Parts:
    """Gives every group of examples (a speaker, a hospital) to one client, whole.

    Groups go, largest first and ties by name, to the client with fewest examples so far (the lowest number on a tie):
    the C largest groups become clients 0..C-1 in that order, and further groups join the smallest clients. With fewer
    groups than clients, the last clients get nothing.
    """
    names, group_of, sizes = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    owner = np.empty(len(names), dtype=np.int64)
    load = np.zeros(clients, dtype=np.int64)
    for group in np.argsort(-sizes, kind="stable"):
        owner[group] = np.argmin(load)
        load[owner[group]] += sizes[group]
    return [np.flatnonzero(owner[group_of] == client) for client in range(clients)]


def repair(parts: Parts, least: int, rng: np.random.Generator) -> Parts:
    """Moves random examples, one at a time, from the largest part to those below `least`; nothing is lost or copied.

    Needs at least `least` examples per part over all parts.
    """
    hands = [list(map(int, part)) for part in parts]
    for hand in hands:
        while len(hand) < least:
            largest = max(hands, key=len)
            hand.append(largest.pop(rng.integers(len(largest))))
    return [np.sort(np.asarray(hand, dtype=np.int64)) for hand in hands]


# --------------------------------------------------------------------------------------------- stratified order


def stratified_order(labels: IntArray, rng: np.random.Generator) -> IntArray:
    """Returns a random order [N] any stretch of which has the label shares of the whole, up to rounding (ours).

    The n examples of a class stand at (i + u) / n for i = 0..n-1, with one random u per class: a stretch that covers
    the share p of [0, 1) holds floor(p n) or ceil(p n) of them, p n on average (systematic sampling).
    """
    position = np.empty(len(labels))
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        position[rows] = (np.arange(len(rows)) + rng.random()) / len(rows)
    return np.argsort(position, kind="stable")


def draw_examples(labels: IntArray, count: int, rng: np.random.Generator) -> IntArray:
    """Draws `count` of the examples, stratified by label; returns their row numbers in increasing order."""
    return np.sort(stratified_order(labels, rng)[:count])


def split_own_test(labels: IntArray, share: float, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Splits one client's examples, stratified by label, into training rows and its own test rows.

    At least one example trains; with share > 0 and two examples or more, at least one tests.

    Args:
        labels: Class numbers of the client's examples [n].
        share: Share of the examples that tests, in [0, 1).
        rng: The client's own generator.

    Returns:
        Two increasing arrays of positions in `labels`.
    """
    tests = min(len(labels) - 1, max(1, round(share * len(labels)))) if share > 0 else 0
    order = stratified_order(labels, rng)
    return np.sort(order[tests:]), np.sort(order[:tests])


def _cuts(shares: FloatArray, examples: int) -> IntArray:
    """Where to cut `examples` so that the pieces have these shares; no example is lost to rounding."""
    return np.round(np.cumsum(shares)[:-1] * examples).astype(np.int64)


# -------------------------------------------------------------------------------------------------------- errors


def _checked_natural(partition: Partition, groups: Sequence[str], clients: int) -> Parts:
    parts = natural(groups, clients)
    short = [client for client, part in enumerate(parts) if len(part) < partition.min_examples]
    if short:
        found = len(set(groups))
        if found < clients:
            raise DataError(
                f"data.partition.key: the column {partition.key!r} has {found} different values for {clients} clients: "
                f"{_these(range(found, clients))} would be empty. Set clients.count to at most {found}, or choose "
                "another key."
            )
        raise DataError(
            f"data.partition.key: by the column {partition.key!r}, {_these(short)} would have fewer than "
            f"{partition.min_examples} examples (min_examples). Lower clients.count, so that small groups are merged, "
            "or data.partition.min_examples."
        )
    return parts


def _these(clients: Sequence[int]) -> str:
    shown = ", ".join(map(str, clients[:8])) + (f" and {len(clients) - 8} more" if len(clients) > 8 else "")
    return f"client {shown}" if len(clients) == 1 else f"clients {shown}"
