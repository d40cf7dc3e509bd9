"""What is told of a round: a line per client, a line per round. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from hfedmoe_ray.types import Status, TaskKind


@dataclass(frozen=True, kw_only=True)
class ClientRecord:
    """One line of `events.jsonl`: what one client did in one round."""

    round: int
    client: int
    tier: str
    status: Status
    kind: TaskKind = "train"
    reason: str = ""
    attempts: int = 1
    demotions: int = 0
    """Attempts that ran out of memory, after each of which the client was given less to do at once."""
    samples: int = 0
    tokens: int = 0
    """Real tokens that its optimizer steps read."""
    loss: float | None = None
    resident: int = 0
    """Experts held, merged ones among them."""
    trained: int = 0
    """Experts that took at least one optimizer step."""
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    peak_mib: float = 0.0
    over_mib: float = 0.0
    """What the peak has more than the tier's `memory_gib`; 0 within it."""
    simulated_seconds: float | None = None
    """What the task would take on the tier's device (`federation.clock`); None where it names none."""
    staleness: int = 0
    """tau: averages taken between its start and the one it came to; 0 in runs with rounds."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkScore:
    """What a model answered to the items of a benchmark."""

    items: int
    measures: Mapping[str, float]
    """Of multiple choice, `accuracy`: share of the items whose right choice has the highest log-likelihood, and
    `normalised`: the same by log-likelihood per character, which does not favour short choices. Of written answers,
    `exact_match`: share of the right ones. Of texts, `word_perplexity`, `byte_perplexity` and `token_perplexity`: e to
    the power of their negative log-likelihood in nats by word, byte and token."""

    @property
    def fields(self) -> dict[str, float]:
        """As it is recorded: `items` and the measures."""
        return {"items": self.items, **self.measures}


@dataclass(frozen=True, kw_only=True)
class NodeUsage:
    """How busy one machine was, everything that runs on it counted."""

    node: int
    """Its number in this run, from 0 in the order in which nodes were first seen."""
    name: str
    """Its address."""
    cpu_percent: float
    """Mean over all cores and the time since the report before."""
    memory_percent: float
    """In use at the moment of the report."""
    gpu_percent: tuple[float, ...] = ()
    """Of each GPU, mean over samples taken every ten seconds."""
    gpu_memory_percent: tuple[float, ...] = ()
    """Of each GPU, the largest of these samples."""


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """One round as it is tracked: a line of `metrics.jsonl`, a step in W&B, a row on the screen."""

    round: int
    loss: float | None
    """Mean training loss of the round's clients."""
    accuracy: float | None
    """Accuracy of the global model on the global test split (None where not evaluated)."""
    test_loss: float | None
    own_accuracy: float | None
    """Mean over clients of the accuracy on their own test split, holding only their resident experts."""
    clients: tuple[ClientRecord, ...]
    selected: tuple[tuple[int, ...], ...]
    """How many clients trained each expert, `[L][E]`."""
    usage: tuple[tuple[float, ...], ...]
    """Mean gate value of each expert over the cohort's tokens, `[L][E]`."""
    bytes_up: int
    bytes_down: int
    seconds: float
    phases: Mapping[str, float]
    """Seconds spent in profile, plan, agree (on masks, with `secure`), train (while there is work for every slot), wait
    (for the last clients), reduce, publish, evaluate; where evaluation overlaps, in waiting for that of the round
    before."""
    agreement: float | None = None
    """Mean Jensen-Shannon divergence of the clients' usage to their mean (nats; 0 = all route alike)."""
    participation: float | None = None
    """Mean over clients of |S_c| / |S_global| (eq. 18); logged, never used."""
    personalised_accuracy: float | None = None
    """`own_accuracy` after each client has trained for one more round by itself (last round only)."""
    simulated_seconds: float | None = None
    """What the round would take on the tiers' devices: its slowest client's, of those that were waited for."""
    benchmarks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What the global model answered, `BenchmarkScore.fields` by benchmark (first and last round only)."""
    privacy: Mapping[str, float] = field(default_factory=dict)
    """Where the model is private, what it has spent so far: epsilon, delta, noise_multiplier, releases (models noised,
    those of repeated rounds among them), and where the record is full, clipped (share of the round's clients). Where
    single examples are, example_epsilon and example_delta: of the client with fewest, had it been
    asked in every round."""
    backdoor_success: float | None = None
    """With a simulated backdoor: share of the test texts of other labels that the global model gives the attack's
    target once they carry its trigger."""
    robust: Mapping[str, float] = field(default_factory=dict)
    """With `robust`: clipped (clients whose change was scaled down), withheld (experts that too few have trained)."""
    nodes: tuple[NodeUsage, ...] = ()
    """The machines of the run, the first 64 of them; those that did not answer in time are left out."""
