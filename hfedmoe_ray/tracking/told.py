"""Which rounds a destination has been told, across the processes of a run: none twice, none left out.

W&B, TensorBoard and MLflow only append. A resumed run computes its last rounds again, with the same result, and must
not tell them again; and what a destination missed, because it failed, is in the run's own record.
"""

from pathlib import Path

from hfedmoe_ray.records import RoundReport
from hfedmoe_ray.tracking.record import read_run


class Told:
    """The last round a destination was told, kept in a file of the run directory."""

    def __init__(self, run_dir: Path, destination: str) -> None:
        """Args: the run's directory, and the one below it that is the destination's own."""
        self._run_dir = run_dir
        self._path = run_dir / destination / "rounds-told"
        self._last = -1

    def begin(self, *, resumed: bool) -> None:
        """Begins anew, or goes on where the last process of the run ended."""
        last = int(self._path.read_text()) if resumed and self._path.exists() else -1
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self.set(last)

    def missed(self) -> tuple[RoundReport, ...]:
        """The rounds of the run's record that were not told, in order."""
        return tuple(report for report in read_run(self._run_dir).rounds if report.round > self._last)

    def __contains__(self, round: int) -> bool:
        return round <= self._last

    def set(self, round: int) -> None:
        """Notes the last round that has been told."""
        self._last = round
        self._path.write_text(f"{round}\n")
