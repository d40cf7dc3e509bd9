"""Sections that make no sense together, each said in one sentence with what to write instead. Torch-free."""

from typing import TYPE_CHECKING

from hfedmoe_ray.config.plugins import is_plugin, load_plugin
from hfedmoe_ray.config.server import Rules, ServerOptimizer
from hfedmoe_ray.config.strategies import Flux, Local

if TYPE_CHECKING:
    from hfedmoe_ray.config.schema import Experiment


def check_combinations(experiment: "Experiment") -> None:
    """Raises ValueError for the first combination that makes no sense."""
    for check in (_owed_factors, _nothing_averaged, _factors_without_direction, _merged_factors):
        check(experiment)


def _owed_factors(experiment: "Experiment") -> None:
    lora = experiment.model.lora
    if experiment.wire.feeds_back and lora is not None and lora.average == "svd":
        raise ValueError(
            "with `model.lora.average: svd` the factors are others after each round, so what a client owes of the "
            "old ones means nothing to the new: write `model.lora.average: factors` or `wire.error_feedback: false`"
        )


def _nothing_averaged(experiment: "Experiment") -> None:
    strategy = experiment.strategy
    if load_plugin(strategy.name).federated if is_plugin(strategy.name) else not isinstance(strategy, Local):
        return
    for section, default in (("rules", Rules()), ("server", ServerOptimizer())):
        if getattr(experiment, section) != default:
            raise ValueError(
                f"strategy {strategy.name} averages nothing, so there is nothing for `{section}` to do: drop it"
            )


def _factors_without_direction(experiment: "Experiment") -> None:
    lora, optimizer = experiment.model.lora, experiment.server.optimizer
    if optimizer != "mean" and lora is not None and lora.average == "svd":
        raise ValueError(
            f"with `model.lora.average: svd` the factors are drawn up anew after each round, so old minus new is no "
            f"direction that {optimizer} could follow: write `model.lora.average: factors` or `server.optimizer: mean`"
        )


def _merged_factors(experiment: "Experiment") -> None:
    if isinstance(experiment.strategy, Flux) and experiment.model.lora is not None:
        raise ValueError(
            "strategy flux merges experts as whole weights, but with `model.lora` only factors travel, and the mean of "
            "factors is not the factors of a mean: leave `model.lora` out, or use another strategy"
        )
