"""Prepared models and data for nodes that do not have them: a directory as one object per file, checked by hash.

A run is prepared on the server's node, in its cache. Other nodes may share that directory (a network file system),
have prepared it themselves, or lack it; only the last receive it, once per node, into their own cache.
"""

import fcntl
import hashlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray

from hfedmoe_ray.context import cache_dir
from hfedmoe_ray.errors import ClusterError
from hfedmoe_ray.runtime import timeouts

CHUNK = 2**22


@dataclass(frozen=True, kw_only=True)
class Directory:
    """A directory of the server's node, as other nodes know it."""

    path: Path
    sha256: str
    """`directory_hash` of it."""
    files: Mapping[str, Any] | None = None
    """Object of each file (uint8 array) by relative path; None until some node needs them."""

    def offered(self) -> "Directory":
        """The same with its files in the object store."""
        files = {name: ray.put(np.fromfile(path, dtype=np.uint8)) for name, path in _files(self.path)}
        return Directory(path=self.path, sha256=self.sha256, files=files)

    def find(self) -> Path | None:
        """Where this node has the directory: under the same path, in its cache, received just now, or nowhere yet.

        Raises:
            ClusterError: what was received is not what was offered.
        """
        if self.path.is_dir() and directory_hash(self.path) == self.sha256:
            return self.path
        kept = cache_dir() / "received" / self.sha256
        if kept.is_dir():
            return kept
        return None if self.files is None else self._receive(kept, self.files)

    def _receive(self, target: Path, files: Mapping[str, Any]) -> Path:
        """Writes the files beside the target and renames the whole: nobody ever sees half of it."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_suffix(".lock")):
            if target.is_dir():
                return target
            partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
            try:
                for name, ref in files.items():
                    path = partial / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    ray.get(ref, timeout=timeouts.FETCH).tofile(path)
                if directory_hash(partial) != self.sha256:
                    raise ClusterError(
                        f"The files received for {self.path} differ from those the server offered: they were changed "
                        "during the run. Prepare them again (delete that directory) and resume the run."
                    )
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return target


def directory_hash(path: Path) -> str:
    """SHA-256 over the relative names, sizes and bytes of all files of a directory."""
    digest = hashlib.sha256()
    for name, file in _files(path):
        digest.update(f"{name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    """Every file below a directory with its relative name, in the order of names."""
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    return iter(sorted(files.items()))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock file: of all actors of a node one receives, the others wait and find it there."""
    with path.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
