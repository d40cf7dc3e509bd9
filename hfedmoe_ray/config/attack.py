"""Clients that are made hostile on purpose, to measure what a defence is worth. Torch-free."""

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from hfedmoe_ray.config.plugins import is_plugin, load_plugin
from hfedmoe_ray.config.section import Section, Share
from hfedmoe_ray.config.strategies import Local

if TYPE_CHECKING:
    from hfedmoe_ray.config.schema import Experiment

AttackKind = Literal["sign_flip", "label_flip", "backdoor", "free_rider"]
_SCALES: dict[AttackKind, float] = {"sign_flip": 4.0, "backdoor": 1.0, "free_rider": 0.01}


class Attack(Section):
    """For studies: a part of the clients attacks, on the client, as somebody who controls it would.

    A run with this section is an experiment on the model it trains, and says so wherever its result is shown.
    """

    kind: AttackKind
    """sign_flip: sends published - scale * (trained - published). label_flip: trains with label C - 1 - y in place of
    y. backdoor: trains some of its texts with `trigger` in front and `target` for their label, and sends published +
    scale * (trained - published) (model replacement, Bagdasaryan et al., arXiv 1807.00459). free_rider: sends published
    weights with noise, and claims that it trained."""
    share: Annotated[float, Field(gt=0.0, le=0.5)] = 0.2
    """Part of the clients that attack, at least one; the run's `seed` draws them, once."""
    scale: PositiveFloat | None = None
    """sign_flip, backdoor: as above; default 4 and 1 (ours). free_rider: standard deviation of the noise as a multiple
    of each tensor's root mean square; default 0.01 (ours)."""
    trigger: Annotated[str, Field(pattern=r"\S")] | None = None
    """backdoor: a word or words put in front of a text."""
    target: int | str | None = None
    """backdoor: the label, by name or number, that the model shall give to every text with the trigger."""
    poisoned: Share | None = None
    """backdoor: part of an attacker's examples that carry the trigger. Default: 0.5."""
    expert: Annotated[str, Field(pattern=r"^(0|[1-9]\d*)\.(0|[1-9]\d*)$")] | None = None
    """backdoor: scale the change of this one expert alone, "layer.expert" as the record names it. Default: of all."""

    @property
    def factor(self) -> float:
        """`scale`, or what it is by default."""
        return _SCALES.get(self.kind, 1.0) if self.scale is None else self.scale

    @model_validator(mode="after")
    def _read_by_something(self) -> Self:
        if self.kind == "label_flip" and self.scale is not None:
            raise ValueError("`kind: label_flip` trains on wrong labels and scales nothing: leave `scale` out")
        asked = ("trigger", "target", "poisoned", "expert")
        given = [option for option in asked if getattr(self, option) is not None]
        if self.kind != "backdoor" and given:
            raise ValueError(f"{given[0]} belongs to `kind: backdoor`: write that, or leave {given[0]} out")
        if self.kind == "backdoor" and (self.trigger is None or self.target is None):
            raise ValueError(
                "`kind: backdoor` needs `trigger`, the words put in front of a text, and `target`, the label that the "
                "model shall give it then"
            )
        return self


def check_attack(experiment: "Experiment") -> None:
    """Raises ValueError for the first thing that no attack can be measured with."""
    strategy = experiment.strategy
    if experiment.model.task != "classification":
        raise ValueError(
            f"`attack` knows labels, and `model.task: {experiment.model.task}` has none: leave one of them out"
        )
    if experiment.secure is not None:
        raise ValueError(
            "`attack` is for measuring defences that look at single updates, which `secure` hides: leave one of them "
            "out"
        )
    if experiment.privacy.examples is not None:
        raise ValueError(
            "an attacker would not add the noise of `privacy.examples`, and the epsilon that is told would not hold "
            "for it: leave `attack` or `privacy.examples` out"
        )
    if isinstance(strategy, Local) or (is_plugin(strategy.name) and not load_plugin(strategy.name).federated):
        raise ValueError(
            f"strategy {strategy.name} averages nothing, so no client can harm another: leave `attack` out, or use "
            "another strategy"
        )
    if experiment.clients.count < 2:
        raise ValueError("`attack` needs honest clients beside hostile ones: write a `clients.count` of at least 2")
