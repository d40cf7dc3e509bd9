"""The quickstart cut down to seconds: four clients, one MoE layer of four experts, one step a round."""

from collections.abc import Sequence
from pathlib import Path

from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.config.schema import Experiment

REPOSITORY = Path(__file__).parents[1]
CONFIG = REPOSITORY / "configs" / "quickstart.yaml"
OVERRIDES = (
    "rounds=3",
    "clients.count=4",
    "data.max_examples=160",
    "data.test_examples=40",
    "data.partition.how=iid",
    "model.upcycle.layers=[5]",
    "model.upcycle.experts=4",
    "model.upcycle.top_k=2",
    "model.upcycle.calibration_steps=0",
    "local.steps=1",
    "local.profile_examples=8",
    "tracking.wandb.mode=disabled",
)


def small_experiment(overrides: Sequence[str] = ()) -> Experiment:
    """The experiment with further overrides."""
    return load_experiment(CONFIG, [*OVERRIDES, *overrides])
