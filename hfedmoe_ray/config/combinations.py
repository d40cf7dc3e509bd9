"""Sections that make no sense together, each said in one sentence with what to write instead. Torch-free."""

from typing import TYPE_CHECKING

from hfedmoe_ray.config.server import Rules
from hfedmoe_ray.config.strategies import Local

if TYPE_CHECKING:
    from hfedmoe_ray.config.schema import Experiment


def check_combinations(experiment: "Experiment") -> None:
    """Raises ValueError for the first combination that makes no sense."""
    for check in (_owed_factors, _nothing_averaged):
        check(experiment)


def _owed_factors(experiment: "Experiment") -> None:
    lora = experiment.model.lora
    if experiment.wire.feeds_back and lora is not None and lora.average == "svd":
        raise ValueError(
            "with `model.lora.average: svd` the factors are others after each round, so what a client owes of the "
            "old ones means nothing to the new: write `model.lora.average: factors` or `wire.error_feedback: false`"
        )


def _nothing_averaged(experiment: "Experiment") -> None:
    if isinstance(experiment.strategy, Local) and experiment.rules != Rules():
        raise ValueError("strategy local averages nothing, so there is nothing `rules` could change: leave them out")
