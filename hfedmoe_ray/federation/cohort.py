"""Who takes part in a round."""

from collections.abc import Sequence

import numpy as np

from hfedmoe_ray.config.schema import Clients
from hfedmoe_ray.errors import TrainingError
from hfedmoe_ray.federation.availability import available
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.types import Array


def select_cohort(clients: Clients, seed: int, round: int, examples: Sequence[int]) -> tuple[int, ...]:
    """Returns the clients of a round in ascending order: a draw without replacement from those that are available.

    Where fewer are available than a round should have, all of them take part.

    Args:
        clients: How many there are, how many a round asks, and how they are drawn.
        seed: Of the run.
        round: Of the cohort.
        examples: |D_c| of every client, the chances of a weighted draw.

    Raises:
        TrainingError: Nobody is available.
        DataError: The file that says who is cannot be read.
    """
    there = available(clients, seed, round)
    if not len(there):
        raise TrainingError(
            f"no client is available in round {round} (clients.availability). The last checkpoint is complete: let "
            "more of them be there, and `hfedmoe resume`."
        )
    return draw_clients(clients, there, clients.asked, examples, generator(seed, "cohort", round))


def draw_clients(
    clients: Clients, there: Array, count: int, examples: Sequence[int], rng: np.random.Generator
) -> tuple[int, ...]:
    """Returns so many of the clients that are there in ascending order, without replacement, or all of them.

    Args:
        clients: How they are drawn.
        there: Their numbers, int [A].
        count: How many to draw.
        examples: |D_c| of every client, the chances of a weighted draw.
        rng: Draws.
    """
    if len(there) <= count:
        return tuple(int(client) for client in there)
    chances = None
    if clients.sampling == "weighted":
        weights = np.array([examples[client] for client in there], dtype=np.float64)
        chances = weights / weights.sum()
    draw = rng.choice(there, size=count, replace=False, p=chances)
    return tuple(sorted(int(client) for client in draw))
