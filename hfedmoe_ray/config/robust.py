"""Averaging that a minority of hostile clients cannot take over, as a configuration says it. Torch-free."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from hfedmoe_ray.config.section import Section

if TYPE_CHECKING:
    from hfedmoe_ray.config.schema import Experiment

RobustRule = Literal["mean", "median", "trimmed_mean", "krum", "multi_krum", "geometric_median"]


class Robust(Section):
    """What takes the place of the mean, for each expert, each router and the shared parameters by itself.

    Each has contributors of its own, and of few of them no rule can tell the hostile one: see `min_contributors`.
    All but the mean keep a round's updates in memory until they are averaged.
    """

    rule: RobustRule = "mean"
    """median: of each number, weighted as the mean would be (Yin et al. 2018); trimmed_mean: the mean without the
    largest and the smallest, at each end what the hostile may weigh (the same); krum: of the update that is closest to
    most others, by itself (Blanchard et al. 2017); multi_krum: the mean of all but the `hostile` farthest ones;
    geometric_median: the point with the least weighted distance to all (RFA, Pillutla et al. 2022)."""
    hostile: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.2
    """Share of the contributors that may be hostile, for `mix`, trimmed_mean, krum and multi_krum; rounded up, and
    always less than half of them."""
    mix: bool = True
    """Before any rule but the mean, put in each contribution's place the mean of those closest to it, all but `hostile`
    of them (nearest-neighbour mixing, Allouah et al. 2023): clients whose data differ have no middle otherwise. false:
    the rules as in their own papers."""
    clip: PositiveFloat | None = None
    """Largest L2 norm of a client's whole change; a larger one is scaled down to it, once it has been compared with the
    others. Default: no limit."""
    clip_median: PositiveFloat | None = None
    """The same as a multiple of the median of these norms in the round."""
    min_contributors: PositiveInt = 1
    """An expert (and its row of a router that is averaged row by row) that fewer clients of a round have trained keeps
    its value: the mean of one client's training is that client's training, for all to see. So does a mean output that
    fewer have measured, and a class that fewer have starts without a prototype. Default: as in the papers, who trains
    alone decides alone."""

    @property
    def holds_updates(self) -> bool:
        """Whether a round's updates must be seen together."""
        return self.rule != "mean" or self.clip_median is not None

    @property
    def compares(self) -> bool:
        """Whether what few clients say is left out, or set against what others say."""
        return self.rule != "mean" or self.min_contributors > 1


def check_robust(experiment: "Experiment") -> None:
    """Raises ValueError for the first thing that does not go with it."""
    robust = experiment.robust
    if robust == Robust():
        return
    if experiment.secure is not None:
        raise ValueError(
            "with `secure` the server sees no single update, so there is nothing for `robust` to compare: leave one of "
            "them out (`secure.min_clients` withholds experts that few have trained)"
        )
    if experiment.privacy.central is not None:
        raise ValueError(
            "`privacy.central` bounds every client by its own `clip` and takes a noised mean, whose guarantee `robust` "
            "is not part of: leave one of them out"
        )
    if experiment.strategy.name == "local":
        raise ValueError("strategy local averages nothing, so there is nothing for `robust` to do: drop it")
    replaced = robust.holds_updates or robust.clip is not None
    if replaced and experiment.model.lora is not None and experiment.model.lora.average == "svd":
        raise ValueError(
            "`robust` compares factors number by number, which `model.lora.average: svd` draws up anew each round: "
            "write `model.lora.average: factors`"
        )
    own_literal = getattr(experiment.strategy, "gate_weights", "normalised") == "literal"
    literal = experiment.rules.routers == "alpha_literal" or (experiment.rules.routers is None and own_literal)
    if robust.rule != "mean" and literal:
        raise ValueError(
            f"router weights as printed in the paper do not sum to 1, and `robust.rule: {robust.rule}` has no use for "
            "their sum: write `strategy.gate_weights: normalised` (or another `rules.routers`)"
        )
