"""What a client keeps on its own node: its root secret, and which requests it has answered. Readable by its user alone.

    DIRECTORY/client-7.key       32 random bytes, made when the client is first asked for something
    DIRECTORY/client-7.answered  JSON: the number of the latest session, and for each of its steps a digest

In a simulation on one machine whoever runs the server can read these files as well; what they protect is a client on a
machine of its own.
"""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hfedmoe_ray.trust.secure.keys import ROOT_BYTES
from hfedmoe_ray.trust.secure.session import Refused, Session


class Vault:
    """The memory of one client."""

    def __init__(self, directory: Path, client: int) -> None:
        """Looks into a directory, made where there is none; nothing of the client need be there yet."""
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._key = directory / f"client-{client}.key"
        self._answered = directory / f"client-{client}.answered"

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
            if steps.setdefault(step, request.hex()) != request.hex():
                raise Refused(f"it has answered another request for '{step}' in this session")
            fresh = self._answered.with_suffix(".fresh")
            fresh.unlink(missing_ok=True)
            _write(fresh, json.dumps([session.number, steps]).encode())
            fresh.replace(self._answered)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time: of two that serve the client only one may answer first."""
        lock = os.open(self._answered.with_suffix(".lock"), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def _write(path: Path, content: bytes) -> None:
    """Writes a new file that only its user may read, down to the disk."""
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
