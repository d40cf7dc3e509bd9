"""The small files of a run, carried home in a job's log.

A job runs on a cluster whose disks the submitter may not see, and the one thing Ray delivers from a job to wherever it
was submitted from is its log. So the job prints the record of the run (not the checkpoints) as text between two
marks, and the submitter takes it out of the log again and writes the files.
"""

import base64
import hashlib
import io
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

from hfedmoe_ray.errors import ClusterError

BEGIN, END = "-----BEGIN HFEDMOE RUN", "-----END HFEDMOE RUN"
LINE = 8_000
"""Characters a line; Ray cuts lines beyond 20 000."""
SUFFIXES = (".yaml", ".json", ".jsonl", ".html")
"""Files of the run directory's top level that are carried."""
_NAME = re.compile(rf"[\w-]+({'|'.join(map(re.escape, SUFFIXES))})")


def pack(run_dir: Path) -> Iterator[str]:
    """Yields the lines to print."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        for file in sorted(run_dir.iterdir()):
            if file.is_file() and file.suffix in SUFFIXES:
                tar.add(file, arcname=file.name)
    data = buffer.getvalue()
    text = base64.b85encode(data).decode()
    yield f"{BEGIN} {hashlib.sha256(data).hexdigest()}"
    yield from (text[start : start + LINE] for start in range(0, len(text), LINE))
    yield END


class Receiver:
    """Takes the carried files out of a log that arrives in pieces."""

    def __init__(self) -> None:
        self._rest = ""
        self._sha256 = ""
        self._lines: list[str] | None = None
        self._data: bytes | None = None

    def feed(self, piece: str) -> str:
        """Takes the next piece of the log and returns what of it is to be shown."""
        *lines, self._rest = (self._rest + piece).split("\n")
        return "".join(f"{line}\n" for line in lines if not self._take(line.strip()))

    def flush(self) -> str:
        """What is left to be shown when the log has ended."""
        rest, self._rest = self._rest, ""
        return "" if self._take(rest.strip()) else rest

    def write(self, target: Path) -> list[Path]:
        """Writes the files into `target` and returns them.

        Raises:
            ClusterError: they did not arrive whole.
        """
        if self._data is None:
            raise ClusterError(
                "The job ended without sending its files: they are in the run directory on the cluster, named in the "
                "log above."
            )
        target.mkdir(parents=True, exist_ok=True)
        written = []
        with tarfile.open(fileobj=io.BytesIO(self._data), mode="r:xz") as tar:
            for member in tar.getmembers():
                stream = tar.extractfile(member)
                # Names come from elsewhere: plain ones in this directory, of known kinds, and nothing else.
                if (
                    stream is not None
                    and re.fullmatch(r"[\w-]+\.[a-z]+", member.name)
                    and member.name.endswith(SUFFIXES)
                ):
                    path = target / member.name
                    path.write_bytes(stream.read())
                    written.append(path)
        return written

    def _take(self, line: str) -> bool:
        """Whether a line belongs to the carried files and not to the log."""
        if line.startswith(BEGIN):
            self._sha256, self._lines = line.removeprefix(BEGIN).strip(), []
            return True
        if self._lines is None:
            return False
        if line == END:
            data = base64.b85decode("".join(self._lines))
            if hashlib.sha256(data).hexdigest() == self._sha256:
                self._data = data
            self._lines = None
        else:
            self._lines.append(line)
        return True
