"""The server's side: adds masked vectors up, and takes the masks off their sum."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from hfedmoe_ray.trust.secure.client import Revealed, own_mask, shared_mask
from hfedmoe_ray.trust.secure.field import joined
from hfedmoe_ray.trust.secure.keys import digest, public_key
from hfedmoe_ray.trust.secure.masks import add_mask, ring_dtype
from hfedmoe_ray.trust.secure.session import Block, Roster, Session, check_enough
from hfedmoe_ray.types import Array


class Sum:
    """The sum of masked vectors, block by block."""

    def __init__(self, session: Session, blocks: Sequence[Block]) -> None:
        """Starts with nothing added.

        Args:
            session: What is aggregated.
            blocks: What a vector consists of.
        """
        self._session = session
        self._blocks = blocks
        self._totals = [np.zeros(block.size, ring_dtype(session.ring)) for block in blocks]
        self.arrived: set[int] = set()
        """U3 so far."""

    def check(self, client: int, values: Sequence[Array]) -> None:
        """Raises ValueError unless a vector has the right numbers, as many as the client's blocks have."""
        dtype = ring_dtype(self._session.ring)
        expected = [block.size if client in block.members else 0 for block in self._blocks]
        if [len(one) for one in values] != expected or any(one.dtype != dtype or one.ndim != 1 for one in values):
            raise ValueError(f"it does not hold the {sum(expected)} numbers of {dtype} that were asked for")

    def add(self, client: int, values: Sequence[Array]) -> None:
        """Adds a client's masked vector. Raises ValueError for one that is not as asked for, or a second one."""
        self.check(client, values)
        if client in self.arrived:
            raise ValueError("its vector has been added before")
        self.arrived.add(client)
        for total, numbers in zip(self._totals, values, strict=True):
            if len(numbers):
                np.add(total, numbers, out=total)

    def unmask(self, roster: Roster, present: Sequence[int], revealed: Mapping[int, Revealed]) -> list[Array]:
        """Takes the masks off; returns the sums, numbers of the ring for each block.

        Args:
            roster: U1.
            present: U2.
            revealed: What clients answered when they were told `present` and `arrived`.

        Raises:
            BelowThreshold: Too few vectors, or answers, have come.
            ValueError: Answers do not give the secrets that were shared.
        """
        check_enough(self.arrived, self._session, "delivered their vectors")
        check_enough(revealed, self._session, "answered for the masks")
        here = sorted(self.arrived)
        gone = sorted(set(present) - self.arrived)
        threshold = self._session.threshold
        seeds = joined([{u + 1: one.seeds[v] for u, one in revealed.items()} for v in here], threshold)
        for client, seed in zip(here, seeds, strict=True):
            if digest(seed) != roster[client].seed:
                raise ValueError(f"what was revealed is not the seed of client {client}")
            self._take_off(own_mask(seed), [client], -1)
        masks = joined([{u + 1: one.masks[v] for u, one in revealed.items()} for v in gone], threshold)
        for client, secret in zip(gone, masks, strict=True):
            if public_key(secret) != roster[client].masks:
                raise ValueError(f"what was revealed is not the key of client {client}")
            for other in here:
                # What `other` did to its vector for the one who is gone, undone.
                key = shared_mask(secret, roster[other], self._session)
                self._take_off(key, [client, other], -1 if other < client else 1)
        return self._totals

    def _take_off(self, key: bytes, members: Sequence[int], sign: Literal[1, -1]) -> None:
        """Adds or subtracts a mask in all blocks that have all of the members."""
        for number, (block, total) in enumerate(zip(self._blocks, self._totals, strict=True)):
            if block.members.issuperset(members):
                add_mask(total, key, number, sign)
