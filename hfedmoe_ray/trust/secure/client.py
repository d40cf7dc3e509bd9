"""A client's side of the protocol: four steps, each a pure function of its root secret and of what it is told.

What a client must remember is which requests it has answered: `remember` is told of every step and a digest of what
it was asked, and refuses where that step of the session has been taken for something else (see `vault`).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from hfedmoe_ray.trust.secure.field import SHARE_BYTES, split
from hfedmoe_ray.trust.secure.keys import PublicKeys, agree, coefficients, derive, digest, seal, secrets_of, unseal
from hfedmoe_ray.trust.secure.masks import add_mask
from hfedmoe_ray.trust.secure.session import (
    FEWEST,
    Block,
    Refused,
    Roster,
    Session,
    check_enough,
    roster_digest,
)
from hfedmoe_ray.types import Array

Remember = Callable[[Session, str, bytes], None]
"""(session, step, digest of the request). Raises Refused for a second, different request."""


@dataclass(frozen=True, kw_only=True)
class Revealed:
    """Shares of other clients' secrets: of each client one of the two, never both."""

    seeds: Mapping[int, bytes]
    """Of the seed of its own mask, for those whose vectors arrived."""
    masks: Mapping[int, bytes]
    """Of the key it shares masks by, for those whose vectors did not."""


class Participant:
    """One client in one session."""

    def __init__(self, client: int, root: bytes, session: Session, remember: Remember) -> None:
        """Derives its secrets.

        Args:
            client: Its number.
            root: Its long-term secret.
            session: What it takes part in.
            remember: Where it keeps what it has answered.
        """
        self.client = client
        self._root = root
        self._session = session
        self._remember = remember
        self._secrets = secrets_of(root, session.name)

    def advertise(self) -> PublicKeys:
        """First step: its public keys."""
        public = self._secrets.public
        self._remember(self._session, "keys", roster_digest({self.client: public}))
        return public

    def share(self, roster: Roster) -> dict[int, bytes]:
        """Second step: a sealed letter to every other client, with shares of both secrets.

        Args:
            roster: U1.

        Raises:
            Refused: It would share with too few, with strangers to its own keys, or a second time with others.
        """
        self._check(roster, roster)
        self._remember(self._session, "shares", roster_digest(roster))
        shares = self._own_shares(roster)
        return {
            other: seal(self._letter_key(keys, self.client, other), b"".join(shares[other]))
            for other, keys in roster.items()
            if other != self.client
        }

    def mask(self, roster: Roster, present: Collection[int], blocks: Sequence[Block], values: Sequence[Array]) -> None:
        """Third step: masks its numbers, in place.

        Args:
            roster: U1.
            present: U2, those who sent letters to all.
            blocks: What the vector consists of.
            values: Numbers of the ring, contiguous, for each block; empty for those it is no member of.

        Raises:
            Refused: A block would be all but its own, or it has masked other numbers in this session.
        """
        self._check(roster, present)
        for block, numbers in zip(blocks, values, strict=True):
            mine = self.client in block.members
            if len(numbers) != (block.size if mine else 0):
                raise ValueError(f"{len(numbers)} numbers for a block of {block.size}")
            if mine and len(block.members & set(present)) < FEWEST:
                raise Refused("a block that nobody else adds to would show its numbers")
        who = digest(*(b"%d" % client for client in sorted(present)))
        self._remember(self._session, "masked", digest(who, *(numbers.tobytes() for numbers in values)))
        peers = {other: self._mask_key(roster[other]) for other in sorted(present) if other != self.client}
        own = own_mask(self._secrets.seed)
        for number, (block, numbers) in enumerate(zip(blocks, values, strict=True)):
            if not len(numbers):
                continue
            for other, key in peers.items():
                if other in block.members:
                    add_mask(numbers, key, number, 1 if self.client < other else -1)
            add_mask(numbers, own, number, 1)

    def reveal(
        self, roster: Roster, present: Collection[int], arrived: Collection[int], letters: Mapping[int, bytes]
    ) -> Revealed:
        """Fourth step: shares that take off the masks of those who delivered, or stand in for those who did not.

        Args:
            roster: U1.
            present: U2.
            arrived: U3, those whose masked vectors arrived.
            letters: What each other client of U2 sealed for this one.

        Raises:
            Refused: Too few arrived, or it has answered for another U3: the two answers together would reveal both
                secrets of somebody.
            ValueError: A letter cannot be read.
        """
        self._check(roster, present)
        check_enough(arrived, self._session, "delivered")
        if not set(arrived) <= set(present):
            raise Refused("vectors are said to have come from clients that had not shared their secrets")
        request = digest(*(b"%d %d" % (client, client in arrived) for client in sorted(present)))
        self._remember(self._session, "reveal", request)
        seeds: dict[int, bytes] = {}
        masks: dict[int, bytes] = {}
        for other in present:
            seed, mask = self._read(other, roster, letters)
            if other in arrived:
                seeds[other] = seed
            else:
                masks[other] = mask
        return Revealed(seeds=seeds, masks=masks)

    def _check(self, roster: Roster, present: Collection[int]) -> None:
        """What must hold whenever it is told who takes part."""
        check_enough(present, self._session, "take part")
        if self._session.threshold * 2 <= len(roster):
            raise Refused("the threshold is half of the clients or fewer: two halves could be asked different things")
        if roster.get(self.client) != self._secrets.public:
            raise Refused("its keys are not those it is said to have sent: it was served by another node before")
        if not {self.client, *present} <= roster.keys() or self.client not in present:
            raise Refused("clients are said to take part that sent no keys, or it is left out itself")
        if len({keys.letters for keys in roster.values()} | {keys.masks for keys in roster.values()}) != 2 * len(
            roster
        ):
            raise Refused("two clients have the same public key")

    def _own_shares(self, roster: Roster) -> dict[int, tuple[bytes, bytes]]:
        """Shares of its two secrets for each client; the same ones whenever it is asked for the same roster."""
        points = [client + 1 for client in roster]
        name = f"{self._session.name} {roster_digest(roster).hex()}"
        seeds, masks = (
            split(secret, coefficients(self._root, name, what, self._session.threshold - 1), points)
            for what, secret in (("seed", self._secrets.seed), ("masks", self._secrets.masks))
        )
        return {client: (seeds[client + 1], masks[client + 1]) for client in roster}

    def _read(self, other: int, roster: Roster, letters: Mapping[int, bytes]) -> tuple[bytes, bytes]:
        """Its shares of another client's two secrets."""
        if other == self.client:
            return self._own_shares(roster)[other]
        if other not in letters:
            raise Refused(f"client {other} is said to have shared its secrets, but its letter is missing")
        try:
            text = unseal(self._letter_key(roster[other], other, self.client), letters[other])
        except ValueError as error:
            raise ValueError(f"the letter of client {other} cannot be read: {error}") from error
        if len(text) != 2 * SHARE_BYTES:
            raise ValueError(f"the letter of client {other} has {len(text)} bytes")
        return text[:SHARE_BYTES], text[SHARE_BYTES:]

    def _letter_key(self, other: PublicKeys, sender: int, receiver: int) -> bytes:
        return agree(self._secrets.letters, other.letters, f"letter {self._session.name} {sender} {receiver}")

    def _mask_key(self, other: PublicKeys) -> bytes:
        return shared_mask(self._secrets.masks, other, self._session)


def own_mask(seed: bytes) -> bytes:
    """Returns the key of the mask that belongs to a seed."""
    return derive(seed, "own mask")


def shared_mask(seed: bytes, other: PublicKeys, session: Session) -> bytes:
    """Returns the key of the mask that two clients share, from one's seed and the other's public key."""
    return agree(seed, other.masks, f"mask {session.name}")
