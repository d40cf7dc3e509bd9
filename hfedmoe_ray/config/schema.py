"""Every key a configuration may hold, with its default, its unit and its bounds.

Models are frozen and refuse unknown keys, so that a typing mistake can never become a silent default. Nothing here
imports torch, ray or deepspeed.
"""

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from hfedmoe_ray.config.asynchronous import Asynchronous
from hfedmoe_ray.config.attack import Attack, check_attack
from hfedmoe_ray.config.combinations import check_asynchronous, check_combinations
from hfedmoe_ray.config.comparison import Comparison
from hfedmoe_ray.config.data import Data
from hfedmoe_ray.config.evaluation import Evaluation
from hfedmoe_ray.config.model import Model
from hfedmoe_ray.config.privacy import Privacy, check_privacy
from hfedmoe_ray.config.robust import Robust, check_robust
from hfedmoe_ray.config.running import Runtime, Tracking
from hfedmoe_ray.config.section import Name, NonNegativeFloat, Precision, Section, Share
from hfedmoe_ray.config.secure import Secure, check_secure
from hfedmoe_ray.config.server import Rules, RulesConfig, ServerOptimizer
from hfedmoe_ray.config.simulated import SimulatedDevice
from hfedmoe_ray.config.strategies import HFedMoE, StrategyConfig
from hfedmoe_ray.config.wire import Wire

# ------------------------------------------------------------------------------------------------------ clients


class Tier(Section):
    """A class of devices: the one compute budget that decides Ray resources, experts held and experts trained."""

    name: Name
    share: Share
    """Share of the clients that belong to this tier; the shares of all tiers sum to 1."""
    experts: Share
    """Memory budget: share of all routed experts (over all MoE layers) that the client holds and may train."""
    batch_experts: Share | None = None
    """Compute budget: share of all routed experts that get gradients in one batch. Default: as `experts`."""
    device: PositiveFloat = 1.0
    """Fraction of a GPU, or of a CPU core where the cluster has no GPU. Above 1 a whole number: a client then runs as
    one rank on each of its devices, data parallel over every batch (with `backend: local` as one)."""
    memory_gib: PositiveFloat = 2.0
    """Memory of each device in GiB: asked of Ray, and compared with what the client is predicted to need."""
    precision: Precision | None = None
    """What the tier's clients train in. Default: `local.precision`."""
    micro_batch: PositiveInt | None = None
    """Examples that pass through the model at once while training; gradients are added up over `local.batch_size`.
    Where `batch_experts` limits the choice, the batch's routing is looked at first: one more forward pass."""
    checkpoint_activations: bool = False
    """Keep only what enters each layer and compute the rest again in the backward pass: less memory, more time."""
    zero_stage: int = 0
    """ZeRO stage of the tier's DeepSpeed engines: 0, or 1 or 2 where optimizer state is offloaded or shared by the
    ranks of a client."""
    offload_optimizer: bool = False
    """Keep optimizer state in the host's memory and step there: for GPU clients, with `zero_stage` 1 or 2."""
    num_cpus: NonNegativeFloat | None = None
    """Overrides the CPUs asked of Ray."""
    num_gpus: NonNegativeFloat | None = None
    """Overrides the GPUs asked of Ray, and with them the ranks of a client."""
    labels: dict[str, str] = Field(default_factory=dict)
    """Ray node labels the client must be placed on, e.g. {site: hospital-a}."""
    simulated: SimulatedDevice | None = None
    """The device the tier's clients stand for: gives the run a simulated clock. All tiers have one, or none."""

    @property
    def ranks(self) -> int:
        """Processes that a client of the tier runs as: one for each of several whole devices."""
        return max(1, int(self.num_gpus or self.device))

    @model_validator(mode="after")
    def _deepspeed(self) -> Self:
        if self.zero_stage == 3:
            raise ValueError(
                "zero_stage is 3, which takes parameters out of their tensors between layers; experts are not back in "
                "theirs when their gradients come, and frozen weights shared by the clients of a node would become "
                "private copies. Write 0, or 2 with `offload_optimizer: true` where GPU memory is short, or with a "
                "`device` of several GPUs, over which it partitions optimizer state"
            )
        if self.zero_stage not in (0, 1, 2):
            raise ValueError(f"zero_stage is {self.zero_stage}: write 0, 1 or 2")
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs ZeRO: write `zero_stage: 2` beside it")
        if self.offload_optimizer and self.num_gpus == 0:
            raise ValueError("offload_optimizer moves state from a GPU to the host, but num_gpus is 0: leave one out")
        return self

    @model_validator(mode="after")
    def _whole_devices(self) -> Self:
        for key in ("device", "num_gpus"):
            value = getattr(self, key)
            if value is not None and value > 1 and value != int(value):
                raise ValueError(f"{key} is {value}; above 1 it must be a whole number of devices")
        if self.batch_experts is not None and self.batch_experts > self.experts:
            raise ValueError(
                f"batch_experts ({self.batch_experts}) exceeds experts ({self.experts}): "
                "a client cannot train experts in a batch that it does not hold"
            )
        return self


class Availability(Section):
    """Which clients can be asked in a round."""

    how: Literal["always", "diurnal", "file"] = "always"
    """always; diurnal: each for a part of its day, which begins at a time of its own; file: in the rounds that a file
    names."""
    share: Share | None = None
    """diurnal: part of the day in which a client can be asked. Default: 0.5."""
    period: PositiveInt | None = None
    """diurnal: rounds of a day. Default: 24."""
    path: str | None = None
    """file: CSV with the columns client, first, last: a row for each span of rounds, both ends included."""

    @model_validator(mode="after")
    def _read_by_something(self) -> Self:
        readers = {"share": "diurnal", "period": "diurnal", "path": "file"}
        for option, how in readers.items():
            if getattr(self, option) is not None and self.how != how:
                raise ValueError(f"{option} belongs to `how: {how}`: write that, or leave {option} out")
        if self.how == "file" and self.path is None:
            raise ValueError("`how: file` needs `path`, the CSV file with the columns client, first, last")
        return self


class Clients(Section):
    """Who takes part."""

    count: PositiveInt = 10
    per_round: PositiveInt | None = None
    """Clients drawn for each round. Default: all."""
    over_select: Annotated[float, Field(ge=1.0)] = 1.0
    """How many times as many clients as `per_round` are asked, so that a round need not wait for the slowest: it ends
    when `per_round` updates are in, and who is still at work is dropped. Then results depend on who was quick."""
    sampling: Literal["uniform", "weighted"] = "uniform"
    """How a round's clients are drawn: all with the same chance, or in proportion to their examples. As averages weigh
    examples too, a weighted draw goes with rules that do not (`rules.shared: uniform`)."""
    availability: Availability = Availability()
    """Who can be drawn in a round."""
    failure_rate: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """For studies: chance that a client drops out of a round after it has trained, so that its update is lost (status
    `dropped`). Drawn by (seed, round, client); such losses do not count against `runtime.quorum`."""
    most_examples: PositiveInt | None = None
    """Training examples that a client which reads its own files can have: one that claims more is rejected, as its
    updates weigh by them. Where the examples were dealt their number is known. Default: no limit."""
    tiers: tuple[Tier, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        total = sum(tier.share for tier in self.tiers)
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"the shares of the tiers sum to {total:g}; they must sum to 1")
        names = [tier.name for tier in self.tiers]
        if len(set(names)) != len(names):
            raise ValueError(f"two tiers have the same name: {', '.join(names)}")
        without = [tier.name for tier in self.tiers if tier.simulated is None]
        if 0 < len(without) < len(self.tiers):
            raise ValueError(
                f"no simulated device is given for {', '.join(without)}, but for other tiers: a round's simulated time "
                "needs all of its clients. Write `simulated` in every tier, or in none"
            )
        if self.per_round is not None and self.per_round > self.count:
            raise ValueError(f"per_round is {self.per_round}, but there are only {self.count} clients (count)")
        if self.over_select > 1 and self.cohort == self.count:
            raise ValueError(
                f"over_select is {self.over_select:g}, but every round has all {self.count} clients already: write "
                "`per_round`, fewer than `count`"
            )
        return self

    @property
    def cohort(self) -> int:
        """Updates in each round."""
        return self.per_round or self.count

    @property
    def asked(self) -> int:
        """Clients that are asked for them."""
        return min(self.count, ceil(self.cohort * self.over_select - 1e-9))


# ------------------------------------------------------------------------------------------------ local training


class LocalTraining(Section):
    """What a client does in a round."""

    steps: PositiveInt = 10
    """Optimizer steps."""
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 5e-4
    weight_decay: NonNegativeFloat = 0.01
    clip_norm: NonNegativeFloat = 1.0
    """Gradient norm clipping; 0 switches it off."""
    precision: Precision = "fp32"
    """bf16 computes in bfloat16; trainable weights stay fp32."""
    profile_examples: PositiveInt = 64
    """Examples of the forward-only profiling pass before the first round."""
    cache: Literal["auto", "off"] = "auto"
    """auto: hidden states below the first trainable layer are computed once per client and kept on its node."""
    cache_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the kept states are stored in. fp32 is exact; bf16 (8 bits of every number) and fp16 (11 bits, up to 65504)
    take half the room."""
    cache_gib: PositiveFloat = 8.0
    """Room in GiB that the kept states of all clients and runs may take on a node; those used longest ago make way."""


# ---------------------------------------------------------------------------------------------------- all of it


class Experiment(Section):
    """A whole experiment: one YAML file."""

    name: Name
    """The run directory is `output`/`name`."""
    seed: Annotated[int, Field(ge=0)] = 0
    strategy: StrategyConfig = HFedMoE()
    rules: RulesConfig = Rules()
    """Rules of averaging in place of the strategy's own."""
    server: ServerOptimizer = ServerOptimizer()
    robust: Robust = Robust()
    """Averages that hostile clients cannot take over, and experts that too few have trained."""
    backend: Literal["ray", "local"] = "ray"
    """local: the same run in this one process, for a debugger."""
    actors: Literal["pooled", "dedicated"] = "pooled"
    """dedicated: one live actor per client; pooled: slots that clients take turns in."""
    rounds: PositiveInt = 8
    asynchronous: Asynchronous | None = None
    """Average updates as they come instead of round by round; `rounds` counts the averages. Default: round by round."""
    output: str = "runs"
    clients: Clients
    model: Model
    data: Data
    local: LocalTraining = LocalTraining()
    wire: Wire = Wire()
    privacy: Privacy = Privacy()
    secure: Secure | None = None
    """Aggregate so that the server learns no single update. Default: it sees every one."""
    attack: Attack | None = None
    """For studies: make some clients hostile. Default: none is."""
    evaluate: Evaluation = Evaluation()
    runtime: Runtime = Runtime()
    tracking: Tracking = Tracking()
    compare: Comparison | None = None
    """What `hfedmoe compare` runs of this experiment; no single run reads it."""

    @classmethod
    def load(
        cls, source: "Experiment | Mapping[str, Any] | str | Path | None" = None, /, *overrides: str, **sections: Any
    ) -> "Experiment":
        """Makes an experiment of a YAML file, a mapping, keywords, or another experiment, and overrides.

        Args:
            source: A path, a mapping of the keys a file would have (`extends` among them), or an experiment; nothing,
                where keywords say it all.
            overrides: `key=value` as on the command line, such as "rounds=2".
            sections: Top-level keys, laid over the source: `Experiment.load(path, rounds=2, local={"steps": 5})`.

        Raises:
            ConfigError: with one paragraph that says what is wrong, where, and what to write instead.
        """
        # Imported here, as that module is built on this one.
        from hfedmoe_ray.config.load import load_experiment

        if isinstance(source, Experiment):
            source = source.model_dump(mode="json")
        return load_experiment({} if source is None else source, overrides, **sections)

    @property
    def round_size(self) -> int:
        """Clients of a round: those that are asked, or, where updates are averaged as they come, a buffer of them."""
        return self.clients.asked if self.asynchronous is None else self.asynchronous.buffer

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        writes = self.model.task != "classification"
        if writes != (self.data.response is not None):
            raise ValueError(
                "`model.task: causal` (or seq2seq) and `data.response`, the column with what the model shall write, "
                "need each other: write both or neither"
            )
        if self.model.task == "seq2seq" and (self.data.prompt is None or self.data.template != "auto"):
            raise ValueError(
                "`model.task: seq2seq` needs `data.prompt`, which its encoder reads as it is: name its column, and "
                "leave `data.template` out"
            )
        if self.data.packing and self.model.task != "causal":
            raise ValueError(
                f"`data.packing` is exact where a token sees those before it and nothing else; `model.task: "
                f"{self.model.task}` pools over a row, or counts an expert's capacity in it. Leave it out"
            )
        if self.evaluate.benchmarks and not writes:
            raise ValueError(
                "`evaluate.benchmarks` asks a language model what it would write, and `model.task` is "
                f"{self.model.task}: leave them out, or write `task: causal`"
            )
        if self.model.task == "seq2seq" and any(one.kind == "perplexity" for one in self.evaluate.benchmarks):
            raise ValueError(
                "`kind: perplexity` asks how likely a text is by itself, which a model that answers what its encoder "
                "read does not tell: leave that benchmark out"
            )
        zero = any(tier.zero_stage for tier in self.clients.tiers)
        if self.clients.sampling == "weighted" and self.data.partition.how == "files":
            raise ValueError(
                "`clients.sampling: weighted` draws clients by how many examples they have, which the server does not "
                "know where they read their own files: write `sampling: uniform`"
            )
        if self.asynchronous is not None:
            check_asynchronous(self.asynchronous, self.clients, self.strategy, self.model.lora, self.rules)
        check_combinations(self.strategy, self.model.lora, self.wire, self.rules, self.server, zero=zero)
        check_privacy(self)
        check_robust(self)
        if self.secure is not None:
            check_secure(self.secure, self)
        if self.attack is not None:
            check_attack(self)
        return self
