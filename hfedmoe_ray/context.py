"""Where a run's prepared parts lie: the one value every process of a run is built from."""

import os
from dataclasses import dataclass
from pathlib import Path

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.types import ModelShape


def cache_dir() -> Path:
    """Directory for prepared models and data: $HFEDMOE_CACHE, else ~/.cache/hfedmoe."""
    return Path(os.environ.get("HFEDMOE_CACHE") or Path.home() / ".cache" / "hfedmoe")


@dataclass(frozen=True, kw_only=True)
class PreparedModel:
    """A model on disk in the form clients read: frozen base, initial experts and tokenizer, under a content hash."""

    path: Path
    sha256: str
    """Hash of the tensors; a node that holds another model under this path is refused."""
    shape: ModelShape
    commit: str | None = None
    """Of the hub, that it was made of; None for a model that is not from there."""


@dataclass(frozen=True, kw_only=True)
class PreparedData:
    """A tokenised, partitioned dataset on disk."""

    path: Path
    sha256: str
    label_names: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    """Training examples by [client][class]; all zero where clients read their own files."""
    cut: int = 0
    """Prompts and responses that were longer than `data.max_length`, of training and test examples."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """Everything a worker, wherever it lives, needs to serve any client of the run."""

    experiment: Experiment
    run_dir: Path
    model: PreparedModel
    data: PreparedData
