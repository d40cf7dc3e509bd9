"""What is done so that a model, or the choice of experts, does not tell of one client's data. Torch-free."""

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, model_validator

from hfedmoe_ray.config.section import NonNegativeFloat, Section
from hfedmoe_ray.config.server import Rules
from hfedmoe_ray.config.strategies import FedAvg, FedProx, HFedMoE, RandomExperts

if TYPE_CHECKING:
    from hfedmoe_ray.config.schema import Experiment

MOST_EPSILON = 10.0
"""Above it an epsilon promises next to nothing: an attacker's odds may change by a factor of e^10 = 22 000."""


class Central(Section):
    """Differential privacy of whole clients in the published model (DP-FedAvg, McMahan et al., arXiv 1710.06963).

    The server is trusted with each update; who sees the models is not. Neighbouring are two federations of which one
    has a client more. Each round asks every client with the same chance, `per_round / count`, independently.
    """

    epsilon: PositiveFloat | None = None
    """Of the whole run; the noise is calibrated to it. Either this or `noise_multiplier`."""
    noise_multiplier: NonNegativeFloat | None = None
    """z: standard deviation of the noise on the sum of updates, as a multiple of `clip`."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Below 1 / `clients.count`; needed wherever there is noise."""
    clip: PositiveFloat | None = None
    """Largest L2 norm of a client's whole change: experts, routers and shared parameters as one vector. null: none."""
    expert_clip: PositiveFloat | None = None
    """Before that, largest norm of the change of each single expert, so that no expert takes up the whole of it. On k
    experts together it bounds the norm by expert_clip * sqrt(k); the noise is that of `clip` all the same."""
    accountant: Literal["rdp", "pld"] = "rdp"
    """How rounds are added up: by Rényi divergence, or tighter and slower by privacy loss distributions."""
    repeats: NonNegativeInt = 1
    """Rounds that may have to be repeated because the server died: the noise is calibrated to so many more."""
    record: Literal["redacted", "full"] = "redacted"
    """redacted: trackers are not told what clients measured on their data, nor who took part. full: they are, and
    epsilon does not hold for who sees the record."""
    noise_seed: NonNegativeInt | None = None
    """For tests: draws cohorts and noise from this seed. Who knows it can subtract the noise: nobody is protected."""
    unprotected: bool = False
    """Run although what is configured protects nobody: without noise, or with an epsilon above 10."""

    @property
    def active(self) -> bool:
        """Whether anything is bounded or noised; else averaging is as without this section, to the last bit."""
        return self.clip is not None or self.expert_clip is not None or self.noise_multiplier != 0

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("write either epsilon, to which the noise is calibrated, or noise_multiplier")
        if self.noise_multiplier == 0:
            if not self.unprotected:
                raise ValueError(
                    "noise_multiplier is 0, which protects nobody: write a positive one, or `epsilon`; to measure what "
                    "clipping alone does, write `unprotected: true` beside it"
                )
            return self
        if self.clip is None:
            raise ValueError("noise needs `clip`, the largest norm of a client's change, which it has to cover")
        if self.delta is None:
            raise ValueError("noise needs `delta`, such as 1.0e-5, well below 1 / clients.count")
        if self.epsilon is not None and self.epsilon > MOST_EPSILON and not self.unprotected:
            raise ValueError(
                f"epsilon is {self.epsilon:g}; above {MOST_EPSILON:g} it promises next to nothing. Write less, with "
                "more clients or fewer rounds; or, to measure all the same, `unprotected: true` beside it"
            )
        return self


class Selection(Section):
    """Local differential privacy of what a client tells of its use of experts, by which its experts are chosen.

    Each client answers once in a run, before its first round, and its residents follow from that answer.
    """

    how: Literal["response", "gumbel", "usage"] = "response"
    """response: a random set of its budget's size, the likelier the more of its best experts are in it (randomised
    response over sets). gumbel: the best by a score with Gumbel noise. usage: the usage vector itself, with Laplace
    noise."""
    epsilon: PositiveFloat
    """Of a client's one answer."""
    score_range: PositiveFloat = 4.0
    """gumbel: scores count from 0 to so many times 1/E."""
    noise_seed: NonNegativeInt | None = None
    """For tests and studies: draws from this seed, which protects nobody. Default: each client's own entropy."""

    @model_validator(mode="after")
    def _read_by_something(self) -> Self:
        if self.how != "gumbel" and "score_range" in self.model_fields_set and self.score_range != 4.0:
            raise ValueError("score_range belongs to `how: gumbel`: write that, or leave it out")
        return self


class Examples(Section):
    """Differential privacy of single training examples, by DP-SGD in each client (Abadi et al., arXiv 1607.00133).

    It holds against the server too. Gradients are taken one example at a time, so a step takes a forward and a backward
    pass for each.
    """

    noise_multiplier: PositiveFloat
    """z: standard deviation of the noise on a step's sum of gradients, as a multiple of `clip`."""
    clip: PositiveFloat = 1.0
    """Largest L2 norm of an example's gradient: of all that trains as one vector."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-5
    accountant: Literal["rdp", "pld"] = "rdp"
    """How steps are added up."""
    noise_seed: NonNegativeInt | None = None
    """For tests: draws batches and noise from this seed, which protects nobody. Default: each client's own entropy."""
    unprotected: bool = False
    """Run although epsilon is above 10."""


class Privacy(Section):
    """What protects clients from who sees the model, and their examples and choice of experts from the server."""

    central: Central | None = None
    """Differential privacy of the published model."""
    selection: Selection | None = None
    """Of the choice of experts."""
    examples: Examples | None = None
    """Of each client's single examples, in what it trains."""

    @property
    def repeatable(self) -> bool:
        """Whether nothing is drawn in secret, so that a run comes out alike when it is repeated."""
        central = self.central if self.central is not None and self.central.active else None
        return all(one is None or one.noise_seed is not None for one in (central, self.selection, self.examples))


def check_privacy(experiment: "Experiment") -> None:
    """Raises ValueError for the first thing that what is promised would not hold with."""
    privacy = experiment.privacy
    if privacy.central is not None and privacy.central.active:
        _check_central(experiment, privacy.central)
    if privacy.selection is not None:
        _check_selection(experiment)
    if privacy.examples is not None:
        _check_examples(experiment)


def _check_central(experiment: "Experiment", central: Central) -> None:
    clients, strategy = experiment.clients, experiment.strategy
    if central.delta is not None and central.delta >= 1 / clients.count:
        raise ValueError(
            f"privacy.central.delta is {central.delta:g}, but with {clients.count} clients 1/{clients.count} already "
            f"allows publishing one of them whole: write less, such as {1 / (10 * clients.count):.0e}"
        )
    if not isinstance(strategy, FedAvg | FedProx | HFedMoE | RandomExperts):
        raise ValueError(
            f"with `privacy.central` what a client does may depend on others through the model alone, and strategy "
            f"{strategy.name} averages nothing or lets its plans follow from others' data: write hfedmoe, random, "
            "fedavg or fedprox"
        )
    _check_placement(experiment, "privacy.central")
    if experiment.rules != Rules():
        raise ValueError(
            "with `privacy.central` every client weighs the same, whatever its data, so there is nothing for `rules` "
            "to do: drop it"
        )
    if experiment.model.lora is not None and experiment.model.lora.average == "svd":
        raise ValueError(
            "`privacy.central` bounds and sums changes of the factors, which `model.lora.average: svd` does not "
            "average: write `factors`"
        )
    if experiment.asynchronous is not None or clients.over_select > 1:
        raise ValueError(
            "with `privacy.central` whether a client counts must not depend on how quick others are: leave "
            "`asynchronous` and `clients.over_select` out"
        )
    if clients.sampling != "uniform":
        raise ValueError(
            "with `privacy.central` all clients are asked with the same chance: write `clients.sampling: uniform`"
        )
    if central.record == "redacted" and experiment.evaluate.own != "never":
        raise ValueError(
            "accuracy on the clients' own test data is not covered by `privacy.central`: write `evaluate.own: never`, "
            "or, where nobody but the server sees the record, `privacy.central.record: full`"
        )


def _check_selection(experiment: "Experiment") -> None:
    strategy = experiment.strategy
    if not isinstance(strategy, HFedMoE) or strategy.resident == "all":
        raise ValueError(
            "`privacy.selection` hides which experts a client chooses to hold: write `strategy: hfedmoe` with "
            "`resident: budget`, or leave it out"
        )
    _check_placement(experiment, "privacy.selection")


def _check_examples(experiment: "Experiment") -> None:
    strategy, section = experiment.strategy, "privacy.examples"
    chooses = isinstance(strategy, HFedMoE) and strategy.resident == "budget"
    draws = isinstance(strategy, RandomExperts) and strategy.resident == "budget"
    if not (isinstance(strategy, FedAvg) or draws or (chooses and experiment.privacy.selection is not None)):
        raise ValueError(
            f"`{section}` covers what a client trains, so what it trains must not follow from its data unprotected: "
            "write fedavg, random, or hfedmoe with `privacy.selection`"
        )
    _check_placement(experiment, section)
    if any(tier.zero_stage or tier.ranks > 1 or tier.batch_experts is not None for tier in experiment.clients.tiers):
        raise ValueError(
            f"with `{section}` every step trains all experts a client holds, in one process: leave `zero_stage`, "
            "`batch_experts` and devices above 1 out of the tiers"
        )
    if experiment.evaluate.own != "never":
        raise ValueError(f"with `{section}` clients tell nothing that they measured: write `evaluate.own: never`")


def _check_placement(experiment: "Experiment", section: str) -> None:
    """Statistics of clients that others would get, or that name their classes, in the clear."""
    strategy = experiment.strategy
    if (
        isinstance(strategy, HFedMoE | RandomExperts)
        and strategy.resident == "budget"
        and strategy.unselected == "mean"
    ):
        raise ValueError(
            f"with `{section}` the mean outputs that stand in for absent experts would leave clients in the clear: "
            "write `strategy.unselected: reroute`, `drop` or `frozen`"
        )
    if isinstance(strategy, HFedMoE) and strategy.coverage > 0:
        raise ValueError(
            f"with `{section}` the experts of one client must not depend on the profiles of others, as they do with "
            "`strategy.coverage`: leave it out"
        )
    if experiment.model.head == "prototypes":
        raise ValueError(
            f"with `{section}` class prototypes, sums over the examples of each class, would leave clients in the "
            "clear: write `model.head: random`"
        )
