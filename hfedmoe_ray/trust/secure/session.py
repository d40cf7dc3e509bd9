"""What all who take part in one aggregation know of it: values that travel between them, and no secrets."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Literal

from hfedmoe_ray.trust.secure.keys import PublicKeys, digest
from hfedmoe_ray.trust.secure.masks import Ring

Roster = Mapping[int, PublicKeys]
"""The public keys of those who take part, by client."""
Purpose = Literal["counts", "values"]
"""A round adds up twice: how many take part in each expert, then the numbers of experts that enough take part in."""
PURPOSES: tuple[Purpose, Purpose] = ("counts", "values")
FEWEST = 2
"""The sum of one vector is that vector: no block of fewer clients is ever sent."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """One aggregation. A client takes part in ascending numbers, and for each purpose of a number once."""

    number: int
    """Larger than that of any session before it."""
    threshold: int
    """Fewer clients than this can neither give the sum nor anybody's secrets."""
    ring: Ring
    purpose: Purpose = "values"

    @property
    def name(self) -> str:
        """What secrets are derived for."""
        return f"{self.number}/{self.purpose}/{self.threshold}/{self.ring}"


@dataclass(frozen=True, kw_only=True)
class Block:
    """Part of a vector that the same clients add to."""

    size: int
    """Numbers."""
    members: frozenset[int]
    """Clients. Their masks cancel among themselves."""


class Refused(ValueError):
    """A client was asked for something that would reveal what it has to keep to itself."""


class BelowThreshold(RuntimeError):
    """Too few clients are left for the sum: nobody's masks can be taken off, and nothing was learned."""


def threshold_of(share: float, clients: int) -> int:
    """Returns how many of so many clients a share is."""
    return max(FEWEST, ceil(share * clients - 1e-9))


def check_enough(there: Collection[int], session: Session, did: str) -> None:
    """Raises BelowThreshold if fewer clients than the threshold did something."""
    if len(there) < session.threshold:
        raise BelowThreshold(f"only {len(there)} clients {did}, and {session.threshold} must")


def roster_digest(roster: Roster) -> bytes:
    """Returns a hash of who takes part with which keys."""
    return digest(*(b"%d" % client + keys.letters + keys.masks + keys.seed for client, keys in sorted(roster.items())))
