"""The values that cross a boundary: between server and client, between processes, between rooms of this package.

All are frozen and keyword-only, hold plain Python and NumPy, and never torch: this module imports in milliseconds.
Legend: L MoE layers, E routed experts a layer, H hidden size. An expert is named by its `ExpertKey`, never by a
position in some list.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from hfedmoe_ray.trust.secure.messages import Request

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]

AbsentMode = Literal["mean", "drop", "reroute", "merge"]
Bits = Literal["int8", "int4"]
HeldAs = Literal["exact"] | Bits
TaskKind = Literal["profile", "train", "evaluate", "personalise", "keys", "shares", "upload", "unmask"]
"""The last four are steps of secure aggregation (`trust.secure`), without the model."""
Fetch = Callable[[], bytes]
"""Fetches bytes from wherever they are kept."""
Status = Literal["ok", "late", "failed", "memory", "rejected", "dropped"]
Signal = Literal["accuracy", "loss", "gradient"]
"""What a client can measure of each expert while it trains, [L, E] float64: mean over examples, weighted by how many of
their tokens were routed to the expert, of being classified correctly or of the loss (0 where none was routed); or mean
squared norm of the expert's gradient over the steps in which it had one (before clipping; 0 where it had none)."""


LORA_A, LORA_B = "lora_A", "lora_B"
"""What the names of two low-rank factors differ in: "up_proj.lora_A" and "up_proj.lora_B" belong together."""


class ExpertKey(NamedTuple):
    """One routed expert: its MoE layer (0..L-1, counting only MoE layers) and its number in that layer (0..E-1)."""

    layer: int
    expert: int


class Role(IntEnum):
    """What an expert is to one client in one round."""

    ABSENT = 0
    """Not on the device; `ExpertPlan.absent` says what stands in for it."""
    FROZEN = 1
    """Takes part in the forward pass only, as a read-only copy shared by the clients of a node."""
    TRAIN = 2
    """A private copy that may receive gradients."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The MoE shape of a model: all that planning needs to know about it, without loading it."""

    layers: int
    """L, number of MoE layers."""
    experts: int
    """E, routed experts in each layer."""
    top_k: int
    """Experts each token is routed to."""
    hidden: int
    """H, hidden size."""
    expert_bytes: int
    """Bytes of one expert's weights as they are trained and sent (fp32)."""
    shared_bytes: int
    """Bytes of routers and of the shared parameters that train, as sent (fp32)."""
    frozen_bytes: int
    """Bytes of everything outside experts that never trains and never travels."""
    base_expert_bytes: int = 0
    """Bytes of the frozen matrices of one expert that trains by LoRA, as they lie in memory: shared by the processes
    of a node, never sent. 0 where whole experts train."""
    dense_expert_bytes: int = 0
    """Bytes of one whole expert in fp32, where only its LoRA factors train; 0 where it trains itself."""
    table_bytes: int = 0
    """Bytes of embedding tables among the shared and frozen ones: rows of them are read, none is multiplied with."""

    @property
    def total_experts(self) -> int:
        """L * E."""
        return self.layers * self.experts

    @property
    def vocabulary(self) -> int:
        """V, words of a decoder's vocabulary: rows of its one embedding table."""
        return self.table_bytes // (4 * self.hidden)

    def keys(self) -> Iterator[ExpertKey]:
        """Every expert in (layer, expert) order."""
        return (ExpertKey(layer, expert) for layer in range(self.layers) for expert in range(self.experts))


@dataclass(frozen=True, kw_only=True)
class MergedExpert:
    """One expert that stands in for several ABSENT ones of its layer: their weighted mean, tensor by tensor."""

    layer: int
    members: tuple[int, ...]
    """Numbers of the experts it stands for, ascending."""
    shares: tuple[float, ...]
    """Weight of each member in the mean; they sum to 1."""

    @property
    def keys(self) -> tuple[ExpertKey, ...]:
        """The experts it stands for."""
        return tuple(ExpertKey(self.layer, expert) for expert in self.members)


@dataclass(frozen=True, kw_only=True)
class LoadBalance:
    """A term of a client's loss that spreads its tokens over the experts; formula in `train.balance`."""

    weight: float
    """lambda_n."""
    rho: float = 0.0
    """Share of the cohort's load in F, 0 to 1; the rest is the load of the batch."""
    load: tuple[tuple[float, ...], ...] = ()
    """fbar, the cohort's load: each expert's share of its layer's choices, `[L][E]`; may be empty where rho is 0."""


@dataclass(frozen=True, kw_only=True)
class ExpertPlan:
    """What one client holds, trains and is given for the experts it does not hold, in one round."""

    roles: tuple[tuple[Role, ...], ...]
    """Role of every expert, `[L][E]`."""
    absent: AbsentMode = "mean"
    """What stands in for an ABSENT expert: its mean output, nothing, the token's next present expert, or the merged
    expert it is a member of."""
    merged: tuple[MergedExpert, ...] = ()
    """With `absent` = "merge", which ABSENT experts are merged with which: each is a member of exactly one."""
    frozen_as: HeldAs = "exact"
    """How FROZEN experts travel and are held: as published, or in 8 or 4 bits with a scale per row."""
    top_k: int | None = None
    """Experts each token is routed to on this client, among those present if `absent` is "reroute". None: the model's
    own number."""
    batch_budget: int | None = None
    """K_c of eq. 15: at most so many experts get gradients in one batch, over all layers. None: every TRAIN expert."""
    scale: tuple[float, ...] | None = None
    """Factor on what the routed experts of each layer give, [L]: where it starts, as it is learned in training. None:
    there is none."""
    balance: LoadBalance | None = None
    """Term of the loss while training; None: the task's loss alone."""

    def with_role(self, *roles: Role) -> tuple[ExpertKey, ...]:
        """Experts that have one of `roles`, in (layer, expert) order."""
        return tuple(
            ExpertKey(layer, expert)
            for layer, row in enumerate(self.roles)
            for expert, role in enumerate(row)
            if role in roles
        )

    @property
    def trainable(self) -> tuple[ExpertKey, ...]:
        """Experts that may train."""
        return self.with_role(Role.TRAIN)

    @property
    def needs_means(self) -> bool:
        """Whether some expert is represented by its mean output."""
        return self.absent == "mean" and any(Role.ABSENT in row for row in self.roles)

    @property
    def present(self) -> tuple[ExpertKey, ...]:
        """Experts whose weights the client needs."""
        return self.with_role(Role.TRAIN, Role.FROZEN)


@dataclass(frozen=True, kw_only=True)
class RoutingProfile:
    """How one client's tokens use the experts. All arrays are [L, E] float64; gate values are softmax over all E."""

    usage: FloatArray
    """u_c(e), mean gate value (eq. 16, and eq. 3 over the profiled tokens)."""
    specific: FloatArray
    """max (or a high quantile) of the gate value over tokens (eq. 4)."""
    kl: FloatArray
    """Contribution of the expert to the mutual information between token and expert (eq. 11)."""
    routed: FloatArray
    """Tokens whose top-k contained the expert."""
    tokens: int
    """Tokens profiled, padding excluded."""

    def importance(self, lam: float) -> FloatArray:
        """s(e) = lam * usage + (1 - lam) * specific (eq. 5)."""
        return lam * self.usage + (1.0 - lam) * self.specific

    def ib_score(self, lam: float, beta: float) -> FloatArray:
        """I(e) = s(e) - beta * KL(e) (eq. 14)."""
        return self.importance(lam) - beta * self.kl


@dataclass(frozen=True, kw_only=True)
class ClientInfo:
    """What the server knows of a client when it plans a round."""

    client: int
    tier: str
    resident_experts: int
    """Experts the memory budget holds, over all layers (at least one a layer)."""
    batch_experts: int
    """K_c: experts the compute budget trains in one batch, over all layers."""
    samples: int
    """|D_c|, training examples (0 before the client has reported)."""


@dataclass(frozen=True, kw_only=True)
class ClientTask:
    """One piece of work for one client: a pure function of this value, the published weights and the client's data."""

    kind: TaskKind
    round: int
    client: int
    seed: int
    """Run seed; every generator derives from (seed, purpose, round, client)."""
    plan: ExpertPlan
    version: int
    """Version of the published weights the task starts from."""
    split: Literal["train", "own_test", "global_test", "backdoor", "benchmark"] = "train"
    """Which examples an "evaluate" task reads, and a "personalise" task after it has trained on its own. "backdoor":
    the global test split with the trigger of a simulated attack."""
    benchmark: str = ""
    """Name of the multiple-choice benchmark whose items are read."""
    part: tuple[int, int] = (0, 1)
    """(index, count): the slice of the split that this task evaluates."""
    personal: int | None = None
    """Client whose private weights are laid over the global ones, if the strategy keeps any."""
    micro_batch: int | None = None
    """Examples that pass through the model at once, where the client has been demoted (`federation.demotion`). None: as
    its tier says."""
    weight: float = 1.0
    """Predicted relative cost (`federation.durations`), for placing the longest first."""
    state: Fetch | None = None
    """The client's own state as its last accepted task left it. It travels with the task here, so that any process can
    serve the client; on a real device it would never leave it, and it is not counted as traffic."""
    secure: "Request | None" = None
    """What it is told of the round's secure aggregation; None where updates travel in the clear."""


@dataclass(frozen=True, kw_only=True)
class TaskWeights:
    """The weights of one task, as read-only NumPy views: `shared` and `experts` as named by the layout."""

    shared: Mapping[str, Array]
    """Routers and trainable shared parameters by full parameter name."""
    experts: Mapping[ExpertKey, Mapping[str, Array]]
    """Tensors of every present expert by tensor name (see `moe.derived` for FROZEN experts held in fewer bits)."""
    means: Array | None = None
    """Mean output of every expert over the tokens routed to it, [L, E, H]; None where the plan has no use for it."""
    merged: tuple[Mapping[str, Array], ...] = ()
    """Tensors of every merged expert, in the order of `ExpertPlan.merged`."""
    state: bytes = b""
    """The client's own state (`ClientTask.state`); empty where it has none."""


@dataclass(frozen=True, kw_only=True)
class PersonalWeights:
    """What one client keeps to itself."""

    shared: Mapping[str, Array]
    experts: Mapping[ExpertKey, Mapping[str, Array]]


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One version of the global model as it is published: what trains, never the frozen base."""

    version: int
    shared: Mapping[str, Array]
    """Routers and trainable shared parameters, by full parameter name."""
    experts: Mapping[ExpertKey, Mapping[str, Array]]
    means: Array | None = None
    """Mean output of every expert over the tokens routed to it, [L, E, H]."""
    personal: Mapping[int, PersonalWeights] | None = None
    """Private weights of clients, laid over the global ones when a task asks for them (`ClientTask.personal`)."""

    def seen_by(self, client: int | None) -> "Weights":
        """The weights with a client's private ones laid over them, if it has any."""
        own = None if client is None else (self.personal or {}).get(client)
        if own is None:
            return self
        return replace(self, shared={**self.shared, **own.shared}, experts={**self.experts, **own.experts})


@dataclass(frozen=True, kw_only=True)
class ClientMetrics:
    """The small half of a client's answer; travels as JSON."""

    client: int
    round: int
    kind: TaskKind
    samples: int
    """Training examples of the client (train, profile), or examples evaluated."""
    tokens: int
    """Tokens that passed through the model, padding excluded."""
    loss: float
    """Mean loss per prediction."""
    correct: int = 0
    """Right predictions."""
    answered: Mapping[str, float] = field(default_factory=dict)
    """What adds up to a benchmark's score: items answered right by each measure; or, of texts, their negative
    log-likelihood in nats (`nll`) and how many tokens, words and bytes they have."""
    examples: int = 0
    """Predictions behind `loss` and `correct`: one for each example, token that is to be written, or benchmark item."""
    trained: Mapping[str, int] = field(default_factory=dict)
    """"layer.expert" -> optimizer steps in which the expert received a gradient."""
    before: Mapping[str, str] = field(default_factory=dict)
    """"layer.expert" -> checksum of each TRAIN expert before the first step."""
    after: Mapping[str, str] = field(default_factory=dict)
    """The same after the last step."""
    rebuilt: Mapping[str, str] = field(default_factory=dict)
    """"layer.expert" -> checksum of each trained expert as the server will rebuild it; empty with fp32 uploads."""
    seconds: float = 0.0
    """Wall seconds of the task in its process."""
    step_seconds: float = 0.0
    """Wall seconds of the optimizer steps alone."""
    peak_mib: float = 0.0
    """Peak of the process's own memory in MiB during the optimizer steps; on a GPU, of its allocator there."""
    scale: tuple[float, ...] = ()
    """What training has made of `ExpertPlan.scale`, [L]; empty where there is none."""

    def answers(self, task: ClientTask) -> bool:
        """Whether they are said to be of this task."""
        return (self.client, self.round, self.kind) == (task.client, task.round, task.kind)


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """How a task ended. `payload` fetches the safetensors bytes of the update, at most once."""

    task: ClientTask
    status: Status
    metrics: ClientMetrics | None = None
    payload: Fetch | None = None
    payload_bytes: int = 0
    """What `payload` would fetch."""
    state: Fetch | None = None
    """The client's state after the task, to be kept if the update is accepted; None where it has not changed."""
    state_bytes: int = 0
    """What `state` would fetch."""
    reason: str = ""
    """Why it is not "ok", in one line."""
    attempts: int = 1
    demotions: int = 0
    """Times the client was demoted in this task: each was an attempt that ran out of memory."""


@dataclass(frozen=True, kw_only=True)
class Prototypes:
    """Where the classes lie in front of the task head, as one client sees it."""

    sums: Array
    """Sum of the features of each class's examples, float32 [C, H]."""
    counts: Array
    """Examples of each class, float32 [C]."""


@dataclass(frozen=True, kw_only=True)
class ClientUpdate:
    """A parsed and validated update: only what was trained, as writable fp32 arrays."""

    client: int
    samples: int
    experts: Mapping[ExpertKey, Mapping[str, Array]]
    """New value of each expert that took an optimizer step."""
    shared: Mapping[str, Array]
    """New values of routers and shared parameters."""
    trained: Mapping[ExpertKey, int]
    """Optimizer steps per trained expert."""
    profile: RoutingProfile | None
    means: Mapping[ExpertKey, tuple[Array, int]]
    """Mean output [H] of held experts over the tokens routed to them, and how many tokens that were."""
    prototypes: Prototypes | None = None
    signals: Mapping[Signal, FloatArray] = field(default_factory=dict)
    """What the strategy asked clients to measure of each expert, [L, E]."""
    scale: tuple[float, ...] = ()
    """What training has made of `ExpertPlan.scale`, [L]; empty where there is none."""
    masked: tuple[Array, ...] = ()
    """With secure aggregation, what stands for all of the above but `samples`: masked blocks (`trust.secure`)."""
    payload_bytes: int = 0
