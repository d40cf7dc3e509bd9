"""All that a server knows between two rounds: one value, saved whole and restored whole."""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from hfedmoe_ray.federation.evaluation import Evaluation
from hfedmoe_ray.federation.flight import Flight
from hfedmoe_ray.records import ClientRecord, RoundReport
from hfedmoe_ray.types import Array, Fetch, RoutingProfile, Weights
from hfedmoe_ray.wire import checksum, expert_name


@dataclass(frozen=True, kw_only=True)
class Demotion:
    """What a client that ran out of memory is given less of than its tier says (`federation.demotion`)."""

    micro_batch: int | None = None
    """Examples that pass through the model at once. None: as its tier says."""
    halvings: int = 0
    """Times its memory budget for experts was halved."""


@dataclass
class FederationState:
    """The server's state after `round` rounds (0: profiled, nothing trained yet; -1: nothing done)."""

    weights: Weights
    round: int = -1
    profiles: dict[int, RoutingProfile] = field(default_factory=dict)
    samples: dict[int, int] = field(default_factory=dict)
    """|D_c| as clients reported it."""
    accuracies: list[tuple[int, float]] = field(default_factory=list)
    """(round, accuracy) of every evaluation of the global model."""
    own_accuracies: dict[int, float] = field(default_factory=dict)
    """Latest accuracy of each client on its own test split."""
    personalised_accuracies: dict[int, float] = field(default_factory=dict)
    """The same after the last round and a local training round."""
    benchmarks: dict[int, dict[str, dict[str, float]]] = field(default_factory=dict)
    """What the global model answered after a round: `records.BenchmarkScore.fields` by benchmark."""
    statuses: Counter[str] = field(default_factory=Counter)
    """Client results by status, over all rounds."""
    clients: dict[int, Fetch] = field(default_factory=dict)
    """The clients' own states, of those that have any: kept here in their stead, and never read."""
    demotions: dict[int, Demotion] = field(default_factory=dict)
    """Of clients that ran out of memory."""
    trainings: int = 0
    """Training tasks of clients, over all rounds."""
    out_of_memory: int = 0
    """Those whose first attempt ran out of memory."""
    strategy: dict[str, Array] = field(default_factory=dict)
    """What the strategy has learned (`Strategy.state`)."""
    backdoor_success: float | None = None
    """The latest `Evaluation.backdoor`."""
    server: dict[str, Array] = field(default_factory=dict)
    """The server optimizer's moments."""
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    peaks_mib: dict[str, float] = field(default_factory=dict)
    """Largest peak of a client's own memory, by tier."""
    simulated: list[float] = field(default_factory=list)
    """The simulated clock at the end of each round, from round 0; empty where the tiers name no device."""
    flights: list[Flight] = field(default_factory=list)
    """Tasks under way, where rounds wait for nobody; else none."""
    older: dict[int, Weights] = field(default_factory=dict)
    """Earlier versions of the weights, by number, that tasks under way started from."""
    unmeasured: RoundReport | None = None
    """What is to be reported of the last round once it is evaluated, where that is still due."""

    def version(self, number: int) -> Weights:
        """The version of the weights that a task started from."""
        return self.older.get(number, self.weights)

    def demotion(self, client: int) -> Demotion:
        """What a client is given less of; nothing, where it never ran out of memory."""
        return self.demotions.get(client, Demotion())

    def record(
        self,
        round: int,
        records: Iterable[ClientRecord],
        seconds: float,
        simulated: float | None = None,
    ) -> None:
        """Closes a round: counts what its clients did; it took so long, and simulated."""
        self.round = round
        self.seconds += seconds
        if simulated is not None:
            self.simulated.append(self.simulated[-1] + simulated if self.simulated else simulated)
        for record in records:
            self.statuses[record.status] += 1
            if record.kind == "train":
                self.trainings += 1
                self.out_of_memory += record.demotions > 0 or record.status == "memory"
            self.bytes_up += record.bytes_up
            self.bytes_down += record.bytes_down
            if record.peak_mib:
                self.peaks_mib[record.tier] = max(self.peaks_mib.get(record.tier, 0.0), record.peak_mib)

    def measured(self, round: int, evaluation: Evaluation) -> None:
        """Keeps what the evaluation of a round has found."""
        if evaluation.accuracy is not None:
            self.accuracies.append((round, evaluation.accuracy))
        if evaluation.backdoor is not None:
            self.backdoor_success = evaluation.backdoor
        self.own_accuracies |= evaluation.own
        self.personalised_accuracies |= evaluation.personalised
        if evaluation.benchmarks:
            self.benchmarks[round] = {name: score.fields for name, score in evaluation.benchmarks.items()}


def model_sha256(weights: Weights, base_sha256: str) -> str:
    """Hash of the whole model: the frozen base, the shared parameters, every expert, and private weights if any."""
    digest = hashlib.sha256(base_sha256.encode())
    digest.update(checksum(weights.shared).encode())
    for key in sorted(weights.experts):
        digest.update(f"{expert_name(key)}:{checksum(weights.experts[key])}".encode())
    for client, own in sorted((weights.personal or {}).items()):
        digest.update(f"client {client}:{checksum(own.shared)}".encode())
        for key in sorted(own.experts):
            digest.update(f"{expert_name(key)}:{checksum(own.experts[key])}".encode())
    return digest.hexdigest()
