"""The methods, their options and defaults. Torch-free; what they do stands in `hfedmoe_ray.strategies`."""

from collections.abc import Mapping
from math import ceil, floor
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    TypeAdapter,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from hfedmoe_ray.config.plugins import StrategyOptions, is_plugin, plugin_options
from hfedmoe_ray.config.section import NonNegativeFloat, Section, Share, UnitInterval


class Placement(StrategyOptions):
    """How a budgeted strategy treats the experts a client did not choose."""

    resident: Literal["budget", "all"] = "budget"
    """budget: a client holds only as many trainable experts as its budget; all: it holds every expert and the budget
    limits only how many get gradients in a batch (the paper's setting)."""
    unselected: Literal["frozen", "mean", "drop", "reroute"] = "mean"
    """With `resident: budget`, what stands in for an expert that was not chosen: a shared read-only copy of it, its
    mean output, nothing, or the token's next present expert."""
    scope: Literal["global", "per_layer"] = "global"
    """Whether the budget is spent over all layers together (at least one expert a layer) or equally in each."""

    @property
    def deployed(self) -> Literal["mean", "drop", "reroute"]:
        """What stands in for an absent expert when a client uses the model holding only its budget."""
        return "mean" if self.resident == "all" or self.unselected == "frozen" else self.unselected


class HFedMoE(Placement):
    """HFedMoE (arXiv 2601.00583): information-bottleneck selection and sparsity-aware aggregation."""

    name: Literal["hfedmoe"] = "hfedmoe"
    lam: UnitInterval = 0.9
    """Weight of cumulative against specific importance (eq. 5). The default is ours: the paper gives none, and at 0.5
    the largest gate value, which differs twice as much between experts as the mean, outweighs it."""
    beta: NonNegativeFloat = 0.1
    """Price of information in the score (eq. 14); 0 is plain importance."""
    tau: NonNegativeFloat | None = None
    """Usage threshold of participation as a multiple of the uniform share 1/E (eq. 17; relative form ours). Default: 1;
    with `coverage` 0, as the threshold would leave out the very experts that coverage had clients train."""
    rank_by: Literal["ib", "importance"] = "ib"
    specific: Literal["max", "q99"] = "max"
    """Specific importance: the largest gate value of a batch, or its 99 % quantile (ours; max saturates)."""
    participation: Literal["trained", "usage"] = "trained"
    """Who is averaged into an expert: usage above tau and trained (ours), or usage above tau alone (the paper)."""
    gate_weights: Literal["normalised", "literal"] = "normalised"
    """Router weights alpha of eq. 20, normalised to sum to 1 (ours) or as printed (shrinks the router)."""
    explore: UnitInterval = 0.1
    """Share of the resident budget given to experts drawn at random (ours)."""
    decay: UnitInterval = 0.5
    """How far the profile of an expert a client does not hold moves to the cohort's mean each round (ours)."""
    coverage: UnitInterval = 0.0
    """Share of the clients' places that goes to other experts than their best, so that unpopular ones are trained too.
    Residents are then chosen for the cohort as a whole, that share of them dealt evenly over all experts, round by
    round; in a batch that share of the budget is drawn from what else was routed to. 0: the best alone. `explore` is a
    share of the residents that are left (ours)."""

    anchor: UnitInterval | None = None
    """Share of the cohort that must take part in an expert for its mean to be taken whole (`rules.anchor`). Default: 0,
    as in the paper; with `coverage` 1, as covered experts have few trainers each (ours)."""

    @property
    def held_back(self) -> float:
        """`anchor`, or its default."""
        return self.anchor if self.anchor is not None else float(self.coverage > 0)

    @property
    def threshold(self) -> float:
        """`tau`, or its default."""
        return self.tau if self.tau is not None else float(self.coverage == 0)


class FlexMoE(Placement):
    """FLEX-MoE (arXiv 2512.23070): experts assigned by fitness under capacity and load balance; private routers."""

    name: Literal["flex_moe"] = "flex_moe"
    unselected: Literal["frozen", "mean", "drop", "reroute"] = "reroute"
    """As in `Placement`; a client's own router chooses among the experts it was assigned (our reading of the paper)."""
    fitness: Literal["accuracy", "loss"] = "accuracy"
    """How well an expert serves a client: its accuracy on examples sent there, or exp(-loss_scale * their loss)."""
    loss_scale: NonNegativeFloat = 1.0
    """a, with `fitness: loss`."""
    smoothing: Share = 0.3
    """b: how far an assigned pair's fitness moves to what was measured each round."""
    tolerance: UnitInterval | None = 0.1
    """d: how far an expert's holders may be from the mean, as a share of it. null: no bounds, so that every client is
    given its fittest experts (the paper's greedy control)."""

    @model_validator(mode="after")
    def _assigns(self) -> Self:
        if self.resident == "all":
            raise ValueError(
                "resident is `all`, but FLEX-MoE assigns to every client the experts it holds: where each holds all, "
                "there is nothing to assign. Leave it out; to keep the other experts in the forward pass, write "
                "`unselected: frozen`"
            )
        return self


class ActiveExperts(StrategyOptions):
    """A strategy whose clients hold and train every expert, and route a token to as many as their budget allows.

    A client's k is its tier's `experts` times what `of` says, rounded, at least 1 (`budget.active_experts`).
    """

    of: ClassVar[Literal["experts", "top_k"]]


class FFTMoE(ActiveExperts):
    """FFT-MoE (arXiv 2508.18663): alike adapters for all, k_n of M active by budget, a load-balancing loss.

    The form of the loss and its defaults are ours (METHODS: the paper's formula was not available):
    lambda_n M sum_m F_m P_m, F = (1 - rho) f^n + rho fbar, lambda_n = lambda_0 (1 + a (1 - k_n/M) + b JS(f^n || fbar)).
    Meant for `model.upcycle: {how: adapters}` with `model.trainable: experts`, but any Mixture of Experts will do.
    """

    name: Literal["fft_moe"] = "fft_moe"
    of: ClassVar[Literal["experts", "top_k"]] = "experts"
    balance: NonNegativeFloat = 0.01
    """lambda_0, weight of the load-balancing loss; 0 switches it off. a = b = rho = 0 is Switch Transformer's loss."""
    a: NonNegativeFloat = 1.0
    """How much more it weighs for a client with few active experts."""
    b: NonNegativeFloat = 1.0
    """How much more it weighs for a client whose load differs from the cohort's (JS in nats, at most 0.69)."""
    rho: UnitInterval = 0.5
    """Share of the cohort's load, as of the last round of each of its clients, in the load that is balanced."""


class Flame(ActiveExperts):
    """FLAME (arXiv 2506.16600): every client holds all experts, k_i active by budget; averages weigh f^t |D|.

    k_i is a share of the model's own top-k. Meant for `model.lora`; whole experts train without.
    """

    name: Literal["flame"] = "flame"
    of: ClassVar[Literal["experts", "top_k"]] = "top_k"
    temperature: NonNegativeFloat = 2.0
    """t, the power of an expert's activation frequency in its weight (a review of the paper names 2 to 4 as good)."""
    rescale: bool = True
    """Whether each client learns a factor on what the routed experts of a layer give, to make up for those not active.
    It is the client's own, starts at 1, and the global model, with its own top-k, has none (ours)."""


class RandomExperts(Placement):
    """Control: as many experts as HFedMoE would hold, drawn at random each round; plain averaging."""

    name: Literal["random"] = "random"


class FedAvg(Section):
    """Control: every client trains every expert, no budget; averaging by |D_c| (the unbudgeted ceiling)."""

    name: Literal["fedavg"] = "fedavg"


class FedProx(Section):
    """FedAvg with a proximal term (arXiv 1812.06127)."""

    name: Literal["fedprox"] = "fedprox"
    mu: PositiveFloat = 0.01
    """Strength of the pull towards the published weights."""


class FrequentExperts(Placement):
    """Control: the experts most of a client's tokens are routed to, as many as HFedMoE would hold; plain averaging."""

    name: Literal["frequency"] = "frequency"


class FedMoE(Placement):
    """FedMoE (arXiv 2408.11304): sub-models by activation, router rows averaged with their expert."""

    name: Literal["fedmoe"] = "fedmoe"
    unselected: Literal["frozen", "mean", "drop", "reroute"] = "reroute"


class Local(Section):
    """Control: no federation; every client trains all experts on its own data and keeps the result."""

    name: Literal["local"] = "local"


class Flux(StrategyOptions):
    """Flux (arXiv 2508.19078): tune the experts of most use, merge the others, explore by forward passes alone."""

    name: Literal["flux"] = "flux"
    merged: Share = 0.25
    """Share of the memory budget given to merged experts, at least one a layer. One takes a quarter of the memory of
    one that trains: weights, but neither gradient nor AdamW's two moments (ours)."""
    epsilon: Share = 0.5
    """Share of the other slots that train in the first round; the rest explores (the figure is ours)."""
    epsilon_last: Share = 0.9
    """The same once `epsilon_rounds` rounds have passed; it grows linearly (ours)."""
    epsilon_rounds: PositiveInt = 8
    probes: PositiveInt = 2
    """Directions in which the gradient of an explored expert is estimated, two forward passes each."""
    components: PositiveInt = 8
    """Principal components of the expert weights that clusters are made from."""
    profile: Literal["int8", "int4", "exact"] = "int8"
    """Form of the experts from which a round's routing profile is taken."""

    def slots(self, resident: int, layers: int, total: int) -> tuple[int, int]:
        """(slots, merged): experts held as they are, and at most so many merged ones, in the room of `resident`.

        Args:
            resident: Experts that the memory budget would train.
            layers: MoE layers.
            total: Experts of the model.
        """
        merged = max(layers, floor(4 * self.merged * resident + 1e-9))
        slots = max(1, resident - ceil(merged / 4))
        return slots, min(merged, total - slots)


BuiltIn = Annotated[
    HFedMoE | FlexMoE | FFTMoE | Flame | RandomExperts | FedAvg | FedProx | FrequentExperts | FedMoE | Local | Flux,
    Field(discriminator="name"),
]
_BUILT_IN: TypeAdapter[BuiltIn] = TypeAdapter(BuiltIn)


def _by_name(value: Any, _: ValidatorFunctionWrapHandler) -> StrategyOptions | BuiltIn:
    """Validates the options of a built-in strategy, or by those of the class that is named."""
    options = {"name": value} if isinstance(value, str) else value
    if isinstance(options, Mapping) and is_plugin(options.get("name")):
        return plugin_options(options["name"]).model_validate(options)
    if isinstance(options, StrategyOptions) and is_plugin(options.name):
        return options
    return _BUILT_IN.validate_python(options)


StrategyConfig = Annotated[BuiltIn | SerializeAsAny[StrategyOptions], WrapValidator(_by_name)]
