"""TensorBoard: event files in RUN/tensorboard, so that `tensorboard --logdir runs` compares all runs.

The numbers and their names are those of W&B; a layout for the tab "Custom Scalars" comes with them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hfedmoe_ray.config.load import dump_experiment
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.records import RoundReport
from hfedmoe_ray.tracking.scalars import RoundScalars, tier_names
from hfedmoe_ray.tracking.told import Told

DIRECTORY = "tensorboard"
LAYOUT = {
    "What it learned": {
        "accuracy": ["Multiline", ["global/accuracy", "own/accuracy"]],
        "loss": ["Multiline", ["global/loss", "train/loss"]],
    },
    "What it cost": {
        "seconds of a round by phase": ["Multiline", ["seconds/(profile|plan|publish|train|wait|reduce|evaluate)"]],
        "MiB of a round": ["Multiline", ["traffic/up_mib", "traffic/down_mib"]],
        "processors (%)": ["Multiline", [r"node/\d+/(cpu|gpu\d+)"]],
    },
    "Who took part": {
        "clients by outcome": ["Multiline", ["clients/.*"]],
        "seconds by tier": ["Multiline", ["tier/.*/seconds"]],
        "experts trained by tier": ["Multiline", ["tier/.*/experts_trained"]],
    },
}


class TensorBoardTracker:
    """Writes a run's numbers as event files (see `Tracker`)."""

    def __init__(self, run_dir: Path) -> None:
        self._dir = run_dir
        self._told = Told(run_dir, DIRECTORY)
        self._writer: Any = None
        self._scalars: RoundScalars | None = None

    def start(self, config: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Opens a file; a new run begins with its configuration, and replaces what an earlier one left."""
        from torch.utils.tensorboard import SummaryWriter

        resumed_from = facts.get("resumed_from")
        directory = self._dir / DIRECTORY
        if resumed_from is None:
            for old in directory.glob("events.out.tfevents.*"):
                old.unlink()
        self._told.begin(resumed=resumed_from is not None)
        self._scalars = RoundScalars(self._dir, tier_names(config), resumed_from)
        self._writer = SummaryWriter(str(directory))
        if resumed_from is None:
            text = dump_experiment(Experiment.model_validate(config))
            self._writer.add_text("configuration", "".join(f"    {line}\n" for line in text.splitlines()), 0)
            self._writer.add_custom_scalars(LAYOUT)
        for report in self._told.missed() if resumed_from is not None else ():
            self.round(report)

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """Events are for the files and the screen."""

    def round(self, report: RoundReport) -> None:
        """Writes a round to disk, unless it is there already."""
        assert self._scalars is not None
        numbers = self._scalars.of(report)  # also of a round that is there already: it counts in the totals
        if report.round in self._told:
            return
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, report.round)
        self._writer.flush()
        self._told.set(report.round)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Closes the file: the summary is in summary.json."""
        del summary
        self._writer.close()
