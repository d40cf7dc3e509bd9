"""Strategies: policies that plan what each client holds and trains, and rules that reduce what comes back."""

from hfedmoe_ray.config import schema
from hfedmoe_ray.strategies.base import Strategy
from hfedmoe_ray.strategies.controls import FedAvg, Local, RandomExperts
from hfedmoe_ray.strategies.hfedmoe import HFedMoE
from hfedmoe_ray.types import ModelShape

__all__ = ["Strategy", "build_strategy"]


def build_strategy(config: schema.StrategyConfig, shape: ModelShape, seed: int) -> Strategy:
    """Returns the strategy that a configuration names."""
    match config:
        case schema.HFedMoE():
            return HFedMoE(config, shape, seed)
        case schema.RandomExperts():
            return RandomExperts(config, shape, seed)
        case schema.FedAvg():
            return FedAvg(shape, seed)
        case schema.Local():
            return Local(shape, seed)
