"""What travels: requests to a client as values of its task, its answers as safetensors. Neither holds a secret."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from safetensors.numpy import save

from hfedmoe_ray.trust.secure.client import Revealed
from hfedmoe_ray.trust.secure.field import SHARE_BYTES
from hfedmoe_ray.trust.secure.keys import PublicKeys
from hfedmoe_ray.trust.secure.layout import Layout
from hfedmoe_ray.trust.secure.session import Roster, Session
from hfedmoe_ray.types import Array, RoutingProfile
from hfedmoe_ray.wire.payload import pack_update
from hfedmoe_ray.wire.tensors import MASKED, read_tensors

_KEYS = ("letters", "masks", "seed")


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the server tells a client; later steps need more of it."""

    session: Session
    roster: Roster = field(default_factory=dict)
    """U1, from the second step on."""
    present: tuple[int, ...] = ()
    """U2, from the third step on."""
    layout: Layout | None = None
    """Third step: what a vector consists of."""
    arrived: frozenset[int] = frozenset()
    """Fourth step: U3."""
    letters: Mapping[int, bytes] = field(default_factory=dict)
    """Fourth step: by sender."""

    @property
    def nbytes(self) -> int:
        """Bytes of keys, letters and numbers of clients; what it says of the layout follows from the model."""
        keys = sum(len(one.letters) + len(one.masks) + len(one.seed) + 4 for one in self.roster.values())
        letters = sum(len(letter) + 4 for letter in self.letters.values())
        return keys + letters + 4 * (len(self.present) + len(self.arrived))


def write_keys(keys: PublicKeys) -> bytes:
    """Returns the answer of the first step."""
    return save({name: np.frombuffer(getattr(keys, name), np.uint8) for name in _KEYS})


def read_keys(payload: bytes) -> PublicKeys:
    """Inverse of `write_keys`. Raises ValueError for anything else."""
    tensors = read_tensors(payload, MASKED)
    if set(tensors) != set(_KEYS) or any(one.dtype != np.uint8 or one.shape != (32,) for one in tensors.values()):
        raise ValueError("these are not the public keys of a client")
    return PublicKeys(**{name: tensors[name].tobytes() for name in _KEYS})


def write_letters(letters: Mapping[int, bytes]) -> bytes:
    """Returns the answer of the second step: letters by receiver."""
    return save({str(client): np.frombuffer(letter, np.uint8) for client, letter in letters.items()})


def read_letters(payload: bytes, receivers: Sequence[int]) -> dict[int, bytes]:
    """Inverse of `write_letters`. Raises ValueError unless there is one letter for each receiver, of the right size."""
    tensors = read_tensors(payload, MASKED)
    if set(tensors) != {str(client) for client in receivers}:
        raise ValueError("there is not one letter for each other client")
    if any(one.dtype != np.uint8 or one.shape != (2 * SHARE_BYTES + 16,) for one in tensors.values()):
        raise ValueError("a letter has not the size of two shares")
    return {client: tensors[str(client)].tobytes() for client in receivers}


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
    tensors: dict[str, Array] = {}
    for name in ("seeds", "masks"):
        shares: Mapping[int, bytes] = getattr(revealed, name)
        tensors |= {f"{name}.{client}": np.frombuffer(share, np.uint8) for client, share in shares.items()}
    return save(tensors)


def read_revealed(payload: bytes, request: Request) -> Revealed:
    """Inverse of `write_revealed`. Raises ValueError unless it answers the request."""
    tensors = read_tensors(payload, MASKED)
    here = {f"seeds.{client}": client for client in request.present if client in request.arrived}
    gone = {f"masks.{client}": client for client in request.present if client not in request.arrived}
    if set(tensors) != here.keys() | gone.keys():
        raise ValueError("it has not revealed one share of each client")
    if any(one.dtype != np.uint8 or one.shape != (SHARE_BYTES,) for one in tensors.values()):
        raise ValueError("what it revealed are no shares")
    return Revealed(
        seeds={client: tensors[name].tobytes() for name, client in here.items()},
        masks={client: tensors[name].tobytes() for name, client in gone.items()},
    )
