"""What a run has spent of its privacy, a line per release, on the disk before anything is released.

A checkpoint comes after a round's model has been published. A server that dies in between repeats the round, with other
clients and other noise, and whoever saw both models saw two releases. So what counts is not the checkpoint's round, but
every draw of noise: it is written down first, and a repeated round is a further line.
"""

import json
import os
from pathlib import Path

from hfedmoe_ray.errors import CheckpointError
from hfedmoe_ray.trust.accounting import Release


class Ledger:
    """The file of a run's releases."""

    def __init__(self, path: Path, *, rounds: int | None) -> None:
        """Goes on with a file, or begins one.

        Args:
            path: The file, beside the checkpoints.
            rounds: Rounds that the checkpoint has, where a run is resumed; None begins anew.

        Raises:
            CheckpointError: The file of a run to be resumed is missing, damaged or too short.
        """
        self._path = path
        self.releases: list[Release] = []
        """(q, z) of every draw of noise, in order."""
        if rounds is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            return
        lines = path.read_text().splitlines() if path.exists() else []
        try:
            entries = [json.loads(line) for line in lines]
            self.releases = [(float(one["rate"]), float(one["noise_multiplier"])) for one in entries]
            seen = {int(one["round"]) for one in entries}
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}, which says how much privacy the run has spent, is damaged ({error}): bring it back, or start "
                "the run again"
            ) from error
        if missing := set(range(1, rounds + 1)) - seen:
            raise CheckpointError(
                f"{path}, which says how much privacy the run has spent, tells nothing of round {min(missing)}: bring "
                "back the file that belongs to the checkpoint, or start the run again"
            )

    def write(self, round: int, release: Release) -> None:
        """Notes a release and waits until it is on the disk."""
        rate, multiplier = release
        line = json.dumps({"round": round, "rate": rate, "noise_multiplier": multiplier})
        with self._path.open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.releases.append(release)
