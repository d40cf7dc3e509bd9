"""What training was measured to cost, kept in the cache for planning. Torch-free; `train.calibrate` measures.

Above an idle process, the peak of a client's own memory is taken to be (ours)

    fixed + r * expert + n * (example + s * routed)

with r experts that train, n examples that pass at once, and s the share of all experts that compute anything (where
budgets set a client's top-k instead of the experts it holds: that as a multiple of the model's own): bytes of an
expert's weights, gradient and optimizer state, and bytes of activations per example. Four measurements give the four
numbers. The seconds of an optimizer step are taken to be a sum of the same form.

One client's texts were measured, of a few batches. Where it is known how long those of the experiment are, its examples
count by the tokens that they have in the largest batch of a round, against those they had then.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path

from hfedmoe_ray.config.schema import Experiment, Tier
from hfedmoe_ray.config.strategies import ActiveExperts, Placement, StrategyConfig
from hfedmoe_ray.context import cache_dir
from hfedmoe_ray.types import ModelShape

FORMAT = 3
"""Raised when a file's meaning changes; what was measured before is then measured again."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The four numbers, in bytes or in seconds."""

    fixed: float
    """Routers and what else trains in every client, with gradients and optimizer state, and what libraries add."""
    expert: float
    example: float
    routed: float
    """Of the experts' part of an example, were all experts present."""

    def of(self, resident: int, share: float, examples: float) -> float:
        """What so many experts that train cost, with that share of all experts present and so many examples."""
        return self.fixed + resident * self.expert + examples * (self.example + share * self.routed)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What one kind of client costs."""

    peak: Cost
    """Bytes above an idle process."""
    step: Cost
    """Seconds of an optimizer step of a process that has a core, or a GPU, to itself."""
    tokens: float
    """Of an example, padding included, in the largest batch that was measured."""


def setting(experiment: Experiment, tier: Tier, shape: ModelShape, *, gpu: bool) -> dict[str, object]:
    """Everything but experts and examples that decides how much memory training takes."""
    strategy = experiment.strategy
    return {
        "format": FORMAT,
        "device": "gpu" if gpu else "cpu",
        "model": experiment.model.model_dump(mode="json", exclude={"head", "revision"}),
        "experts": (shape.layers, shape.experts, shape.top_k, shape.hidden, shape.expert_bytes),
        "precision": tier.precision or experiment.local.precision,
        "checkpoint": tier.checkpoint_activations,
        "zero": (tier.zero_stage, tier.offload_optimizer),
        "max_length": experiment.data.max_length,
        "cache": experiment.local.cache,
        "absent": _absent(strategy),
    }


def examples_at_once(experiment: Experiment, tier: Tier) -> int:
    """Examples that pass through the model together while it trains, on each of a client's ranks."""
    share = ceil(experiment.local.batch_size / tier.ranks)
    return min(tier.micro_batch or share, share)


def _absent(strategy: StrategyConfig) -> str:
    """What differs between the measurements of a strategy's clients, besides how many experts train."""
    match strategy:
        case Placement():
            return strategy.unselected
        case ActiveExperts():
            return "none, top-k varies"
    return "none"


def path_of(found: dict[str, object]) -> Path:
    """Where the calibration of a `setting` lies, or will."""
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()
    return cache_dir() / "calibration" / f"{digest[:24]}.json"


def read(experiment: Experiment, tier: Tier, shape: ModelShape, *, gpu: bool) -> Calibration | None:
    """What was measured for a tier's clients on this machine; None if nothing was."""
    path = path_of(setting(experiment, tier, shape, gpu=gpu))
    if not path.is_file():
        return None
    found = json.loads(path.read_text())["measured"]
    return Calibration(peak=Cost(**found["peak"]), step=Cost(**found["step"]), tokens=found["tokens"])


def write(experiment: Experiment, tier: Tier, shape: ModelShape, measured: Calibration, *, gpu: bool) -> None:
    """Keeps what was measured, beside what it was measured for."""
    found = setting(experiment, tier, shape, gpu=gpu)
    path = path_of(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps({"setting": found, "measured": asdict(measured)}, indent=2))
    partial.replace(path)
