"""What travels: requests to a client as values of its task, its answers as safetensors. Neither holds a secret."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from safetensors.numpy import save

from hfedmoe_ray.trust.secure.client import Revealed
from hfedmoe_ray.trust.secure.field import SHARE_BYTES
from hfedmoe_ray.trust.secure.keys import PublicKeys
from hfedmoe_ray.trust.secure.layout import Layout
from hfedmoe_ray.trust.secure.session import PURPOSES, Purpose, Roster, Session
from hfedmoe_ray.types import Array, RoutingProfile
from hfedmoe_ray.wire.payload import pack_update
from hfedmoe_ray.wire.tensors import MASKED, read_tensors

_KEYS = ("letters", "masks", "seed")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the server tells a client; later steps need more of it."""

    session: Session
    """In the first two steps, for either purpose."""
    rosters: Mapping[Purpose, Roster] = field(default_factory=dict)
    """U1, from the second step on."""
    present: tuple[int, ...] = ()
    """U2, from the third step on."""
    layout: Layout | None = None
    """Third step: what a vector consists of."""
    kept: Layout | None = None
    """Third step, values: the layout of what the client has kept."""
    arrived: frozenset[int] = frozenset()
    """Fourth step: U3."""
    letters: Mapping[int, bytes] = field(default_factory=dict)
    """Fourth step: by sender."""

    @property
    def roster(self) -> Roster:
        """Of this purpose."""
        return self.rosters.get(self.session.purpose, {})

    def sessions(self) -> list[Session]:
        """This session for either purpose."""
        return [replace(self.session, purpose=purpose) for purpose in PURPOSES]

    @property
    def nbytes(self) -> int:
        """Bytes of keys, letters and numbers of clients; what it says of the layout follows from the model."""
        rosters = self.rosters.values()
        keys = sum(len(one.letters) + len(one.masks) + len(one.seed) + 4 for r in rosters for one in r.values())
        letters = sum(len(letter) + 4 for letter in self.letters.values())
        return keys + letters + 4 * (len(self.present) + len(self.arrived))


def write_keys(keys: Mapping[Purpose, PublicKeys]) -> bytes:
    """Returns the answer of the first step."""
    return _written({f"{of}.{name}": getattr(one, name) for of, one in keys.items() for name in _KEYS})


def read_keys(payload: bytes) -> dict[Purpose, PublicKeys]:
    """Inverse of `write_keys`. Raises ValueError for anything else."""
    sent = _read(payload, [f"{of}.{name}" for of in PURPOSES for name in _KEYS], 32, "public keys")
    return {of: PublicKeys(**{name: sent[f"{of}.{name}"] for name in _KEYS}) for of in PURPOSES}


def write_letters(letters: Mapping[Purpose, Mapping[int, bytes]]) -> bytes:
    """Returns the answer of the second step: letters by purpose and receiver."""
    return _written({f"{of}.{client}": letter for of, one in letters.items() for client, letter in one.items()})


def read_letters(payload: bytes, receivers: Sequence[int]) -> dict[Purpose, dict[int, bytes]]:
    """Inverse of `write_letters`. Raises ValueError unless there is one letter for each receiver, of the right size."""
    names = [f"{of}.{client}" for of in PURPOSES for client in receivers]
    sent = _read(payload, names, 2 * SHARE_BYTES + 16, "letters to each other client")
    return {of: {client: sent[f"{of}.{client}"] for client in receivers} for of in PURPOSES}


def write_vector(blocks: Sequence[Array], profile: RoutingProfile | None) -> bytes:
    """Returns the answer of the third step: masked blocks, and the routing profile where it is sent in the clear."""
    masked = {f"masked.{number}": block for number, block in enumerate(blocks) if len(block)}
    return save(masked | read_tensors(pack_update({}, {}, profile, {})))


def read_vector(payload: bytes, blocks: int) -> tuple[list[Array], bytes]:
    """Inverse of `write_vector`; blocks that were not sent are empty, the rest is the payload of an update.

    Raises:
        ValueError: For bytes that are no safetensors, and for an update's parts that are not to be sent in the clear.
    """
    tensors = read_tensors(payload, MASKED)
    masked = [tensors.pop(f"masked.{number}", None) for number in range(blocks)]
    strange = [name for name in tensors if not name.startswith("profile.")]
    if strange:
        raise ValueError(f"unknown entry {strange[0]!r}")
    kinds = {one.dtype for one in masked if one is not None}
    empty = np.zeros(0, kinds.pop() if len(kinds) == 1 else np.uint8)
    return [empty if one is None else one for one in masked], save(tensors)


def write_revealed(revealed: Revealed) -> bytes:
    """Returns the answer of the fourth step."""
    sent: dict[str, bytes] = {}
    for name in ("seeds", "masks"):
        shares: Mapping[int, bytes] = getattr(revealed, name)
        sent |= {f"{name}.{client}": share for client, share in shares.items()}
    return _written(sent)


def read_revealed(payload: bytes, request: Request) -> Revealed:
    """Inverse of `write_revealed`. Raises ValueError unless it answers the request."""
    here = {f"seeds.{client}": client for client in request.present if client in request.arrived}
    gone = {f"masks.{client}": client for client in request.present if client not in request.arrived}
    sent = _read(payload, [*here, *gone], SHARE_BYTES, "one share of each client")
    return Revealed(
        seeds={client: sent[name] for name, client in here.items()},
        masks={client: sent[name] for name, client in gone.items()},
    )


def _written(named: Mapping[str, bytes]) -> bytes:
    return save({name: np.frombuffer(value, np.uint8) for name, value in named.items()})


def _read(payload: bytes, names: Sequence[str], size: int, what: str) -> dict[str, bytes]:
    """Returns byte strings of one size. Raises ValueError unless there are exactly these."""
    tensors = read_tensors(payload, MASKED)
    if set(tensors) != set(names) or any(one.dtype != np.uint8 or one.shape != (size,) for one in tensors.values()):
        raise ValueError(f"these are not {what}")
    return {name: tensors[name].tobytes() for name in names}
