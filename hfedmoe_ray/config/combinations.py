"""Sections that make no sense together, each said in one sentence with what to write instead. Torch-free."""

from typing import TYPE_CHECKING

from hfedmoe_ray.config.asynchronous import Asynchronous
from hfedmoe_ray.config.lora import Lora
from hfedmoe_ray.config.plugins import is_plugin, load_plugin
from hfedmoe_ray.config.server import Rules, ServerOptimizer
from hfedmoe_ray.config.strategies import FlexMoE, Flux, Local, StrategyConfig
from hfedmoe_ray.config.wire import Wire

if TYPE_CHECKING:
    from hfedmoe_ray.config.schema import Clients


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


def check_asynchronous(
    options: Asynchronous, clients: "Clients", strategy: StrategyConfig, lora: Lora | None, rules: Rules
) -> None:
    """Raises ValueError for the first thing that a run without rounds of its own cannot do."""
    if clients.tiers[0].simulated is None:
        raise ValueError(
            "`asynchronous` orders updates by the simulated clock, which needs to know what devices clients have: "
            "write `simulated: {tflops: …, down_mbps: …, up_mbps: …}` in every tier"
        )
    for key, wanted in (("in_flight", options.in_flight), ("buffer", options.buffer)):
        if wanted > clients.count:
            raise ValueError(f"`asynchronous.{key}` is {wanted}, but there are only {clients.count} clients")
    if clients.per_round is not None or clients.over_select > 1:
        raise ValueError(
            "with `asynchronous` clients are asked one by one: how many are at work says `asynchronous.in_flight`, so "
            "leave `clients.per_round` and `clients.over_select` out"
        )
    if lora is not None and lora.average == "svd":
        raise ValueError(
            "with `model.lora.average: svd` the factors are others after each average, so what a stale update changed "
            "of the old ones means nothing to the new: write `model.lora.average: factors`, or leave `asynchronous` out"
        )
    plugin = load_plugin(strategy.name) if is_plugin(strategy.name) else None
    private = plugin.private_router if plugin else isinstance(strategy, FlexMoE)
    if isinstance(strategy, Local) or (plugin and not plugin.federated):
        reason = "averages nothing"
    elif isinstance(strategy, Flux) or (plugin and plugin.profiles_ahead):
        reason = "profiles the clients of a round while the one before is averaged"
    elif rules.routers == "private" or (rules.routers is None and private):
        reason = "keeps routers private, of which there are no versions"
    else:
        return
    raise ValueError(
        f"strategy {strategy.name} {reason}: leave `asynchronous` out, or use another strategy (or other `rules`)"
    )
