"""Who takes part in a round."""

from hfedmoe_ray.config.schema import Clients
from hfedmoe_ray.seeds import generator


def select_cohort(clients: Clients, seed: int, round: int) -> tuple[int, ...]:
    """Returns the clients of a round in ascending order: a uniform draw without replacement."""
    if clients.cohort == clients.count:
        return tuple(range(clients.count))
    draw = generator(seed, "cohort", round).choice(clients.count, size=clients.cohort, replace=False)
    return tuple(sorted(int(client) for client in draw))
