"""Sections that make no sense together, each said in one sentence with what to write instead. Torch-free."""

from hfedmoe_ray.config.lora import Lora
from hfedmoe_ray.config.plugins import is_plugin, load_plugin
from hfedmoe_ray.config.server import Rules, ServerOptimizer
from hfedmoe_ray.config.strategies import Flux, Local, StrategyConfig
from hfedmoe_ray.config.wire import Wire


def check_combinations(
    strategy: StrategyConfig,
    lora: Lora | None,
    wire: Wire,
    rules: Rules,
    server: ServerOptimizer,
    *,
    zero: bool,
) -> None:
    """Raises ValueError for the first combination that makes no sense; `zero`: whether some tier partitions by ZeRO."""
    if isinstance(strategy, Flux) and zero:
        raise ValueError(
            "strategy flux measures each expert's gradient, which ZeRO moves into buffers of its own: leave "
            "`zero_stage` out of the tiers, or use another strategy"
        )
    if lora is not None:
        _check_factors(strategy, lora, wire, server)
    averages = load_plugin(strategy.name).federated if is_plugin(strategy.name) else not isinstance(strategy, Local)
    for section, unread in (("rules", rules != Rules()), ("server", server != ServerOptimizer())):
        if unread and not averages:
            raise ValueError(
                f"strategy {strategy.name} averages nothing, so there is nothing for `{section}` to do: drop it"
            )


def _check_factors(strategy: StrategyConfig, lora: Lora, wire: Wire, server: ServerOptimizer) -> None:
    """What low-rank factors do not go with."""
    if wire.feeds_back and lora.average == "svd":
        raise ValueError(
            "with `model.lora.average: svd` the factors are others after each round, so what a client owes of the "
            "old ones means nothing to the new: write `model.lora.average: factors` or `wire.error_feedback: false`"
        )
    if server.optimizer != "mean" and lora.average == "svd":
        raise ValueError(
            "with `model.lora.average: svd` the factors are drawn up anew after each round, so old minus new is no "
            f"direction that {server.optimizer} could follow: write `model.lora.average: factors` or "
            "`server.optimizer: mean`"
        )
    if isinstance(strategy, Flux):
        raise ValueError(
            "strategy flux merges experts as whole weights, but with `model.lora` only factors travel, and the mean of "
            "factors is not the factors of a mean: leave `model.lora` out, or use another strategy"
        )
