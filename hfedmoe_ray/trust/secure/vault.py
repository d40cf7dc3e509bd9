"""What a client keeps on its own node: its root secret, and which requests it has answered. Readable by its user alone.

    DIRECTORY/client-7.key       32 random bytes, made when the client is first asked for something
    DIRECTORY/client-7.answered  JSON: the number of the latest session, and for each of its steps a digest
    DIRECTORY/client-7.update    what it has trained in that session and not uploaded yet

In a simulation on one machine whoever runs the server can read these files as well; what they protect is a client on a
machine of its own.
"""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from hfedmoe_ray.trust.secure.keys import ROOT_BYTES
from hfedmoe_ray.trust.secure.session import Refused, Session
from hfedmoe_ray.types import Array


class Vault:
    """The memory of one client."""

    def __init__(self, directory: Path, client: int) -> None:
        """Looks into a directory, made where there is none; nothing of the client need be there yet."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._key = directory / f"client-{client}.key"
        self._answered = directory / f"client-{client}.answered"
        self._update = directory / f"client-{client}.update"

    def root(self) -> bytes:
        """Returns the client's long-term secret; makes it on the first call."""
        if not self._key.exists():
            made = self._key.with_suffix(f".{os.getpid()}-{secrets.token_hex(4)}")
            _write(made, secrets.token_bytes(ROOT_BYTES))
            try:
                os.link(made, self._key)
            except FileExistsError:
                pass  # another process of this node was first
            finally:
                made.unlink()
        return self._key.read_bytes()

    def remember(self, session: Session, step: str, request: bytes) -> None:
        """Takes note of a request before it is answered (see `client.Remember`).

        The same one may be answered again: its answer is the same.

        Raises:
            Refused: This step of the session was taken for another request, or a later session has begun.
        """
        with self._locked():
            latest, steps = json.loads(self._answered.read_text()) if self._answered.exists() else (-1, {})
            if session.number < latest:
                raise Refused("a later session has begun: this one is over")
            if session.number > latest:
                steps = {}
            if steps.setdefault(f"{session.purpose} {step}", request.hex()) != request.hex():
                raise Refused(f"it has answered another request for '{step}' in this session")
            _replace(self._answered, json.dumps([session.number, steps]).encode())

    def keep(self, session: Session, blocks: Sequence[Array]) -> None:
        """Keeps an update, unmasked, until it is uploaded; that of the session before is forgotten."""
        named = {f"block.{number}": block for number, block in enumerate(blocks)}
        with self._locked():
            _replace(self._update, save({"session": np.array([session.number]), **named}))

    def kept(self, session: Session) -> list[Array]:
        """Returns the update that was kept. Raises Refused if that of the session is not on this node."""
        tensors = load(self._update.read_bytes()) if self._update.exists() else {}
        if not tensors or tensors.pop("session").tolist() != [session.number]:
            raise Refused("its update of this round is not here: it was served by another node before")
        return [tensors[f"block.{number}"] for number in range(len(tensors))]

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time: of two that serve the client only one may answer first."""
        lock = os.open(self._answered.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _replace(path: Path, content: bytes) -> None:
    """Writes a file so that there is always a whole one."""
    fresh = path.with_suffix(f"{path.suffix}-fresh")
    fresh.unlink(missing_ok=True)
    _write(fresh, content)
    fresh.replace(path)


def _write(path: Path, content: bytes) -> None:
    """Writes a new file that only its user may read, down to the disk."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        with memoryview(content) as left:
            written = 0
            while written < len(left):
                written += os.write(descriptor, left[written:])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
