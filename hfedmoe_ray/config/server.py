"""What the server does with what comes back: rules of averaging and the optimizer that takes their mean. Torch-free."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, PositiveFloat, model_validator

from hfedmoe_ray.config.section import NonNegativeFloat, Section, UnitInterval

ExpertRuleName = Literal["trained", "plain", "sparsity_aware", "usage_threshold", "usage_weighted", "frequency"]
RouterRuleName = Literal["size", "alpha", "alpha_literal", "rows", "private"]
SharedRuleName = Literal["size", "uniform"]


class Rules(Section):
    """How updates are weighted, in place of the strategy's own rules. Each of the three is independent of the others.

    Written as a word, a paper's preset: `rules: fedmoe`.
    """

    experts: ExpertRuleName | None = None
    """trained: |D_c| of those who trained the expert; plain: |D_c| of those who might have; sparsity_aware: |D_c| of
    those who trained it and use it at least tau / E (HFedMoE, ours); usage_threshold: by use alone (as printed there);
    usage_weighted: u_c(e) of those who trained it (FLEX-MoE); frequency: f^t |D_c| of those who trained it (FLAME)."""
    routers: RouterRuleName | None = None
    """size: |D_c|; alpha: eq. 19-20 of HFedMoE over the experts a client takes part in, normalised (ours);
    alpha_literal: as printed; rows: each row as its expert (FedMoE); private: each client keeps its own, and the global
    model has their mean by what the experts of each weigh together (FLEX-MoE; the mean is ours)."""
    shared: SharedRuleName | None = None
    """size: |D_c|; uniform: every client counts the same."""
    tau: NonNegativeFloat | None = None
    """sparsity_aware, usage_threshold: least use as a multiple of 1/E. Default: `strategy.tau` of hfedmoe, else 1."""
    lam: UnitInterval | None = None
    """alpha, alpha_literal: lambda of eq. 5. Default: `strategy.lam` of hfedmoe, else 0.9."""
    anchor: UnitInterval | None = None
    """Share of the cohort that must take part in an expert for its mean to be taken whole. Where fewer do, the
    published value takes the places of those who are missing, so that what one client made of an expert does not
    replace it. Default: `strategy.anchor` of hfedmoe, else 0, as in the papers (ours)."""
    temperature: NonNegativeFloat | None = None
    """frequency: t, the power of an expert's activation frequency. Default: `strategy.temperature` of flame, else 1."""

    @model_validator(mode="after")
    def _read_by_something(self) -> Self:
        readers: Mapping[str, tuple[str, str | None, tuple[str, ...]]] = {
            "tau": ("experts", self.experts, ("sparsity_aware", "usage_threshold")),
            "lam": ("routers", self.routers, ("alpha", "alpha_literal")),
            "temperature": ("experts", self.experts, ("frequency",)),
        }
        for option, (key, rule, reading) in readers.items():
            if getattr(self, option) is not None and rule not in reading:
                raise ValueError(
                    f"{option} belongs to `{key}: {' or '.join(reading)}`: write that too, or leave it out"
                )
        return self


PRESETS: Mapping[str, dict[str, Any]] = {
    "fedavg": {"experts": "trained", "routers": "size", "shared": "size"},
    "hfedmoe": {"experts": "sparsity_aware", "routers": "alpha", "shared": "size"},
    "hfedmoe_literal": {"experts": "usage_threshold", "routers": "alpha_literal", "shared": "size"},
    "flex_moe": {"experts": "usage_weighted", "routers": "private", "shared": "size"},
    "fft_moe": {"experts": "plain", "routers": "size", "shared": "size"},
    "flux": {"experts": "trained", "routers": "size", "shared": "size"},
    "fedmoe": {"experts": "trained", "routers": "rows", "shared": "size"},
    "flame": {"experts": "frequency", "routers": "size", "shared": "size"},
}
"""The rules of each paper, by name."""


def _preset(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value not in PRESETS:
        raise ValueError(
            f"there is no preset '{value}'; write one of {', '.join(PRESETS)}, or the rules themselves, such as "
            "{experts: trained, routers: rows}"
        )
    return PRESETS[value]


RulesConfig = Annotated[Rules, BeforeValidator(_preset)]


class ServerOptimizer(Section):
    """How the server moves from the old weights to the average of the new (Reddi et al., arXiv 2003.00295)."""

    optimizer: Literal["mean", "fedavgm", "fedadam", "fedyogi"] = "mean"
    """mean: takes the average. The others take old - average for a gradient: with momentum, as Adam, as Yogi."""
    learning_rate: PositiveFloat | None = None
    """eta. Default: 1 with fedavgm, 0.01 with fedadam and fedyogi (ours)."""
    momentum: UnitInterval | None = None
    """beta_1. Default: 0.9."""
    beta2: UnitInterval | None = None
    """fedadam, fedyogi: decay of the squares. Default: 0.99."""
    tau: PositiveFloat | None = None
    """fedadam, fedyogi: added to the root of the squares, which start at tau^2. Default: 0.001."""

    @model_validator(mode="after")
    def _read_by_something(self) -> Self:
        given = [
            option for option in ("learning_rate", "momentum", "beta2", "tau") if getattr(self, option) is not None
        ]
        if self.optimizer == "mean" and given:
            raise ValueError(
                f"`optimizer: mean` has no {given[0]}: leave it out, or write another optimizer "
                "(fedavgm, fedadam, fedyogi)"
            )
        if self.optimizer == "fedavgm" and given and given[-1] in ("beta2", "tau"):
            raise ValueError(f"fedavgm has no {given[-1]}: leave it out, or write fedadam or fedyogi")
        return self
