"""Secure aggregation, as a configuration says it. Torch-free."""

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from hfedmoe_ray.config.plugins import is_plugin, load_plugin
from hfedmoe_ray.config.section import Section, Share
from hfedmoe_ray.config.strategies import FedAvg, FedProx, FFTMoE, Flame, FlexMoE, Flux, Local

if TYPE_CHECKING:
    from hfedmoe_ray.config.schema import Experiment


class Secure(Section):
    """A server that follows the protocol learns the sum of updates and no single one (Bonawitz et al. 2017).

    Needs the package cryptography. What is hidden and what is not: docs/howto/secure-aggregation.md.
    """

    variant: Literal["padded", "grouped"] = "padded"
    """padded: every client sends numbers for the whole model, zeros for what it did not train. grouped: only for
    experts that its plan lets it train, each masked among the clients of that expert: fewer bytes, and a transcript
    shows the plan, which the server made."""
    threshold: Share = 0.6
    """Share of a round's clients that must stay to the end, more than half: fewer can give neither the sum nor
    anybody's secrets, and the round fails."""
    ring: Literal[32, 64] = 32
    """Bits of a number as it travels. 64: twice the bytes, and rounding some 10^9 times finer."""
    clip: PositiveFloat = 1.0
    """Largest change of one parameter in a round; what exceeds it is clipped on the client, and counted."""
    max_samples: PositiveInt = 10_000
    """A client with more examples counts as one with so many."""
    min_clients: Annotated[int, Field(ge=2)] = 2
    """An expert that fewer clients of a round took part in is sent by none of them, and keeps its value."""
    profiles: Literal["aggregate", "clear"] = "aggregate"
    """aggregate: routing profiles, losses and mean outputs are summed like the rest. clear: routing profiles (and the
    class means that start a head) go to the server as they are, for strategies that plan by them."""

    @model_validator(mode="after")
    def _more_than_half(self) -> Self:
        if self.threshold <= 0.5:
            raise ValueError(
                f"threshold is {self.threshold:g}: with half of the clients or fewer a server could have two groups "
                "reveal both secrets of a client. Write more than 0.5"
            )
        return self


def check_secure(secure: Secure, experiment: "Experiment") -> None:
    """Raises ValueError for the first thing that does not go with sums alone."""
    for asked, problem in (
        (
            experiment.asynchronous is not None,
            "`asynchronous` averages updates of several versions as they come, but masks cancel among the clients of "
            "one round: leave `asynchronous` out",
        ),
        (
            experiment.wire.lossy,
            f"masked numbers are already fixed-point, which `wire.upload: {experiment.wire.upload}` cannot compress: "
            "leave `wire` out (`secure.ring: 32` sends as many bytes as fp32)",
        ),
        (
            experiment.model.lora is not None and experiment.model.lora.average == "svd",
            "`model.lora.average: svd` needs the factors of each client: write `model.lora.average: factors`",
        ),
        (
            1 / experiment.clients.over_select < secure.threshold,
            f"`clients.over_select: {experiment.clients.over_select:g}` drops more clients than a threshold of "
            f"{secure.threshold:g} allows: lower one of them",
        ),
        (
            experiment.clients.failure_rate > 1 - secure.threshold,
            f"`clients.failure_rate: {experiment.clients.failure_rate:g}` drops more clients than a threshold of "
            f"{secure.threshold:g} allows: lower one of them",
        ),
        (
            experiment.privacy.central is not None or experiment.privacy.examples is not None,
            "`privacy.central` and `privacy.examples` would have to bound and noise what is summed, which is not "
            "built: leave them or `secure` out (`privacy.selection` goes with it)",
        ),
        (
            experiment.clients.cohort < 3,
            f"a round of {experiment.clients.cohort} has no sum that hides anybody: write at least 3 clients",
        ),
    ):
        if asked:
            raise ValueError(f"with `secure` {problem}")
    _check_strategy(secure, experiment)


def _check_strategy(secure: Secure, experiment: "Experiment") -> None:
    """What a strategy needs of each client by itself."""
    strategy = experiment.strategy
    plugin = load_plugin(strategy.name) if is_plugin(strategy.name) else None
    clear = "write `secure.profiles: clear`, which gives them away,"
    way_out = ""
    if isinstance(strategy, Local) or (plugin and not plugin.federated):
        needs = "averages nothing"
    elif isinstance(strategy, Flux | FlexMoE) or (plugin and _learns(plugin)):
        needs = "learns from what each client measures of its experts"
    elif experiment.rules.routers == "private" or (plugin and plugin.private_router):
        needs = "keeps each client's router on the server"
    elif isinstance(strategy, Flame) and strategy.rescale:
        needs, way_out = "keeps each client's scale on the server", "write `strategy.rescale: false`"
    elif secure.profiles == "clear":
        return
    elif experiment.model.head == "prototypes":
        raise ValueError(
            f"with `secure` class means that start a head would be sent in the clear: {clear} or `model.head: random`"
        )
    elif isinstance(strategy, FFTMoE) and strategy.balance:
        needs, way_out = "balances by each client's load", f"{clear} or `strategy.balance: 0`"
    elif not isinstance(strategy, FedAvg | FedProx | FFTMoE | Flame) and getattr(plugin, "needs_profile", True):
        needs, way_out = "plans by each client's routing profile", clear
    else:
        return
    raise ValueError(
        f"with `secure` the server sees sums alone, but strategy {strategy.name} {needs}: "
        f"{way_out + ' ' if way_out else ''}{'or ' if way_out else ''}use another strategy"
    )


def _learns(plugin: type) -> bool:
    """Whether a strategy of the user's looks at single updates."""
    from hfedmoe_ray.strategies.base import Strategy  # which is built on this room

    observes = getattr(plugin, "observe", Strategy.observe) is not Strategy.observe
    return observes or bool(getattr(plugin, "signals", ())) or bool(getattr(plugin, "profiles_ahead", False))
