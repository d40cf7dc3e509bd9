"""Secrets derived from a client's root, agreement on a secret with another client, and sealed letters to it.

A client keeps one long-term secret, its root. All it needs for one aggregation follows from the root and the session
(HKDF), so that a task repeated in another process does the same again and nothing secret has to travel.
"""

from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256, Hash
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from hfedmoe_ray.trust.secure.field import PRIME, SECRET_BYTES

ROOT_BYTES = 32
_ONCE = bytes(12)
"""Nonce of a sealed letter: its key is used for this one letter."""


@dataclass(frozen=True, kw_only=True)
class PublicKeys:
    """What a client lets everybody know."""

    letters: bytes
    """X25519, to seal letters to it."""
    masks: bytes
    """X25519, to agree on a mask with it."""
    seed: bytes
    """SHA-256 of its own mask's seed: tells the server whether it has put that together rightly."""


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """What a client derives from its root for one session."""

    letters: bytes
    masks: bytes
    seed: bytes
    """Of its own mask."""

    @property
    def public(self) -> PublicKeys:
        """What may be known of them."""
        return PublicKeys(letters=public_key(self.letters), masks=public_key(self.masks), seed=digest(self.seed))


def derive(secret: bytes, purpose: str, length: int = 32) -> bytes:
    """Returns bytes that only who has the secret can know, others for each purpose."""
    return HKDF(SHA256(), length, salt=None, info=f"hfedmoe secure {purpose}".encode()).derive(secret)


def secrets_of(root: bytes, session: str) -> Secrets:
    """Returns a client's secrets of a session."""
    names = ("letters", "masks", "seed")
    return Secrets(**{name: derive(root, f"{session} {name}", SECRET_BYTES) for name in names})


def coefficients(root: bytes, session: str, what: str, count: int) -> list[int]:
    """Returns uniform elements of the field, for the polynomial that shares a secret."""
    # 64 bytes for 255 bits: the remainder is uniform up to 2^-257.
    return [int.from_bytes(derive(root, f"{session} {what} {i}", 64), "big") % PRIME for i in range(count)]


def public_key(seed: bytes) -> bytes:
    """Returns the X25519 public key of the private one that a seed stands for."""
    return _private(seed).public_key().public_bytes_raw()


def agree(seed: bytes, other: bytes, purpose: str) -> bytes:
    """Returns the 32 bytes that two clients get from their own seed and the other's public key."""
    return derive(_private(seed).exchange(X25519PublicKey.from_public_bytes(other)), purpose)


def seal(key: bytes, text: bytes) -> bytes:
    """Encrypts and authenticates one letter (AES-256-GCM); a key is for one letter."""
    return AESGCM(key).encrypt(_ONCE, text, None)


def unseal(key: bytes, letter: bytes) -> bytes:
    """Inverse of `seal`. Raises ValueError for a letter that is not of that key, or was changed."""
    try:
        return AESGCM(key).decrypt(_ONCE, letter, None)
    except InvalidTag as error:
        raise ValueError("it was sealed with another key, or changed on its way") from error


def digest(*parts: bytes) -> bytes:
    """SHA-256 of parts, each with its length."""
    hashed = Hash(SHA256())
    for part in parts:
        hashed.update(len(part).to_bytes(8, "big") + part)
    return hashed.finalize()


def _private(seed: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(derive(seed, "x25519"))
