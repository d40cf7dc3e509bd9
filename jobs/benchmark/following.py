"""What benchmarks of whole runs follow."""

from typing import Any

from hfedmoe_ray.records import RoundReport


class Rounds:
    """The training rounds of a run."""

    def __init__(self) -> None:
        """Starts empty."""
        self.reports: list[RoundReport] = []

    def __call__(self, name: str, fields: Any) -> None:
        """Follows a run (see `federate.Render`)."""
        if name == "round" and isinstance(fields, RoundReport) and fields.round > 0:
            self.reports.append(fields)
