"""What `hfedmoe compare` runs: strategies by settings by seeds, all else being equal. Torch-free."""

from typing import Annotated, Any, Self

from pydantic import Field, PositiveInt, model_validator

from hfedmoe_ray.config.section import Section

Seed = Annotated[int, Field(ge=0)]


class Comparison(Section):
    """The section `compare`. The command line has an option of each name, which then replaces what stands here."""

    strategies: tuple[str, ...] = ()
    """What is compared, each a row of the tables: the name of a strategy or of a variant, and in brackets options of
    its own: hfedmoe, "hfedmoe[beta=0]", "random[resident=all,local.steps=10]"."""
    seeds: tuple[Seed, ...] = Field(default=(0, 1, 2), min_length=1)
    """Run seeds. All strategies have the same ones, so that they are compared in pairs."""
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Settings in all combinations: values by key. A key is that of an override, such as local.steps, or a short name:
    budget (`experts` of every tier) or alpha (`data.partition.alpha`)."""
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Strategies under names of your own: the keys of an experiment that make it, such as
    {coverage: {strategy: {name: hfedmoe, beta: 0}, local: {steps: 10}}}; dotted keys and short names do too."""
    processes: PositiveInt | None = None
    """`backend: local`: runs at a time, one thread each. Default: as many as there are cores and memory for."""

    @model_validator(mode="after")
    def _once(self) -> Self:
        for key, values in (("strategies", self.strategies), ("seeds", self.seeds), *self.grid.items()):
            twice = next((value for index, value in enumerate(values) if value in values[:index]), None)
            if twice is not None:
                raise ValueError(f"{key} names {twice} twice; a comparison needs each once")
        empty = next((key for key, values in self.grid.items() if not values), None)
        if empty is not None:
            raise ValueError(f"grid.{empty} has no value; write at least one, such as {empty}: [0.1, 0.5]")
        return self
