"""What a study is, what it is given, and what it finds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.config.schema import Experiment

Tell = Callable[[str], None]
"""Shows a person what is being done."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text cells; a heading that begins with * is of a column of numbers."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawing with its caption."""

    caption: str
    html: str
    """Legend and inline SVG; escaped by who drew it."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a study found. Every sentence is made of `numbers`."""

    numbers: Mapping[str, Any]
    """Everything that was measured, as JSON holds it."""
    headline: str
    """The result in a sentence."""
    paragraph: str
    """What else it shows, what it does not, how it was measured."""
    figures: Sequence[Figure]
    tables: Sequence[Table]
    sources: Sequence[str] = ()
    """Documents that figures were taken from."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a study works with: the experiment it varies, its seeds, and where runs are kept."""

    config: Path
    overrides: tuple[str, ...]
    """Of the command line; they hold for every run, under what the study itself varies."""
    seeds: tuple[int, ...]
    output: Path
    processes: int | None
    """Runs at a time, each in a process of its own; 1: in this process. None: as many as fit this machine."""
    tell: Tell

    def experiment(self, seed: int, *overrides: str) -> Experiment:
        """The experiment of one run of the study.

        Raises:
            ConfigError: An override does not fit the configuration.
        """
        return load_experiment(
            self.config,
            [*self.overrides, *overrides, f"seed={seed}", "backend=local", "tracking.wandb.mode=disabled"],
        )


@dataclass(frozen=True, kw_only=True)
class Study:
    """One figure of a paper as a command."""

    name: str
    title: str
    shows: str
    """One line for `hfedmoe study --list`."""
    cost: str
    """What it takes with its own configuration on two cores."""
    config: str
    """Its own configuration: a file of configs/."""
    measure: Callable[[Setting], Findings]
    seeds: tuple[int, ...] = (0, 1, 2)
