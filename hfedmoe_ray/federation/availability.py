"""Which clients can be asked in a round: always all, by the time of day where they are, or as a file says (ours)."""

import csv
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from hfedmoe_ray.config.schema import Availability, Clients
from hfedmoe_ray.errors import DataError
from hfedmoe_ray.seeds import generator
from hfedmoe_ray.types import Array

PERIOD, SHARE = 24, 0.5
"""Of a day: its rounds, and the part in which a client can be asked."""
COLUMNS = ("client", "first", "last")
Spans = Mapping[int, tuple[tuple[int, int], ...]]
"""(first, last) round of every span in which a client is available, by client."""


def available(clients: Clients, seed: int, round: int) -> Array:
    """Returns the numbers of the clients that can be asked in a round, ascending, int [A].

    Raises:
        DataError: the file that says so cannot be read.
    """
    match clients.availability.how:
        case "always":
            return np.arange(clients.count)
        case "diurnal":
            return np.flatnonzero(_awake(clients.availability, seed, round, clients.count))
        case "file":
            path = clients.availability.path
            assert path is not None, "the schema wants it"
            spans = read_trace(Path(path), clients.count)
            there = [client for client, named in spans.items() if any(first <= round <= last for first, last in named)]
            return np.array(sorted(there), dtype=np.int64)


def _awake(availability: Availability, seed: int, round: int, count: int) -> Array:
    """Whether it is a client's time of day, bool [count]: each has a day of its own, shifted by a draw."""
    shift = generator(seed, "time-zone").random(count)
    now = (round / (availability.period or PERIOD) + shift) % 1.0
    awake: Array = now < (availability.share or SHARE)
    return awake


@lru_cache(maxsize=4)
def read_trace(path: Path, count: int) -> Spans:
    """Reads a CSV file with the columns client, first, last: a row for each span of rounds, both ends included.

    Args:
        path: The file.
        count: Clients of the run; the file must not name others.

    Raises:
        DataError: It is missing, or some row makes no sense.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"clients.availability.path is {path}, which cannot be read: {error}. Write a CSV file with the columns "
            f"{', '.join(COLUMNS)}: a row for each span of rounds in which a client can be asked."
        ) from error
    spans: dict[int, list[tuple[int, int]]] = {}
    for number, row in enumerate(rows, start=2):
        try:
            client, first, last = (int(row[column]) for column in COLUMNS)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}, line {number}: wanted whole numbers in the columns {', '.join(COLUMNS)}, found {row}."
            ) from error
        if not 0 <= client < count or first > last:
            raise DataError(
                f"{path}, line {number}: client {client}, rounds {first} to {last}. Clients are numbered from 0 to "
                f"{count - 1}, and a span ends no earlier than it begins."
            )
        spans.setdefault(client, []).append((first, last))
    return {client: tuple(named) for client, named in spans.items()}
