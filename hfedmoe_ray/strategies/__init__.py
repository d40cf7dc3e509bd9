"""Strategies: policies that plan what each client holds and trains, and rules that reduce what comes back."""

from typing import Any

from hfedmoe_ray.config import strategies as configs
from hfedmoe_ray.config.plugins import StrategyOptions, is_plugin, load_plugin
from hfedmoe_ray.config.section import Section
from hfedmoe_ray.config.server import Rules
from hfedmoe_ray.strategies.activation import FedMoE, FrequentExperts
from hfedmoe_ray.strategies.base import Strategy
from hfedmoe_ray.strategies.controls import FedAvg, FedProx, Local, RandomExperts
from hfedmoe_ray.strategies.fft_moe import FFTMoE
from hfedmoe_ray.strategies.flame import Flame
from hfedmoe_ray.strategies.flex_moe import FlexMoE
from hfedmoe_ray.strategies.flux import Flux
from hfedmoe_ray.strategies.hfedmoe import HFedMoE
from hfedmoe_ray.strategies.rules import override
from hfedmoe_ray.types import ModelShape

__all__ = ["AnyStrategy", "Strategy", "StrategyOptions", "build_strategy", "built_in"]

AnyStrategy = Strategy[Any]

_STRATEGIES: dict[type[Section], type[AnyStrategy]] = {
    configs.HFedMoE: HFedMoE,
    configs.FlexMoE: FlexMoE,
    configs.FFTMoE: FFTMoE,
    configs.Flame: Flame,
    configs.RandomExperts: RandomExperts,
    configs.FedAvg: FedAvg,
    configs.FedProx: FedProx,
    configs.FrequentExperts: FrequentExperts,
    configs.FedMoE: FedMoE,
    configs.Local: Local,
    configs.Flux: Flux,
}
"""What carries out each section that `strategy` may be."""


def built_in() -> tuple[str, ...]:
    """The names of all strategies of this package."""
    return tuple(section.model_fields["name"].default for section in _STRATEGIES)


def build_strategy(
    config: configs.StrategyConfig, shape: ModelShape, seed: int, rules: Rules | None = None
) -> AnyStrategy:
    """Returns the strategy that a configuration names, with those of its rules replaced that `rules` names."""
    found = load_plugin(config.name) if is_plugin(config.name) else _STRATEGIES[type(config)]
    assert issubclass(found, Strategy), f"{config.name} is no strategy: derive it from hfedmoe_ray.strategies.Strategy"
    strategy = found(config, shape, seed)
    if rules is not None:
        ours = config if isinstance(config, configs.HFedMoE) else configs.HFedMoE()
        temperature = config.temperature if isinstance(config, configs.Flame) else 1.0
        strategy.rules = override(
            strategy.rules, rules, tau=ours.threshold, lam=ours.lam, temperature=temperature, experts=shape.experts
        )
    return strategy
