"""When too few clients deliver, or too many for the same reason do not."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hfedmoe_ray.errors import TrainingError
from hfedmoe_ray.federation.validation import NotAsTrained
from hfedmoe_ray.types import ExpertKey, TaskResult

_SAME_ERROR = 3
"""So many clients failing with the same error in one round mean that the fault is not the clients'."""


def raise_common_failure(results: Iterable[TaskResult], tracebacks: Mapping[int, str]) -> None:
    """Raises if several clients failed with the same error: then it is not the clients that are at fault."""
    failed = [result for result in results if result.status == "failed"]
    for reason, count in Counter(result.reason for result in failed).most_common(1):
        if count >= _SAME_ERROR:
            client = next(result.task.client for result in failed if result.reason == reason)
            trace = tracebacks.get(client, "")
            raise TrainingError(f"{count} clients failed with the same error: {reason}\n{trace}".rstrip())


def below_quorum(outcomes: Sequence[tuple[int, str, str]], did: str = "delivered a usable update") -> str:
    """Tells how (client, status, reason) fell short of what they were to do, and what to do about it."""
    lines = "\n".join(
        f"  client {client}: {status}{f' ({reason})' if reason else ''}" for client, status, reason in outcomes
    )
    arrived = sum(status == "ok" for _, status, _ in outcomes)
    return (
        f"only {arrived} of {len(outcomes)} clients {did}, below `runtime.quorum` (or, where it is "
        "more, `secure.threshold`). The last "
        f"checkpoint is complete: mend the cause and `hfedmoe resume`, or lower the quorum.\n{lines}"
    )


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What the checksums of a client's update have shown."""

    client: int
    round: int
    tier: str
    trainable: Iterable[ExpertKey]
    """What it was to train."""
    flaw: NotAsTrained | None = None
    """What does not fit; None where all does."""


def raise_common_flaw(proofs: Sequence[Proof]) -> None:
    """Raises if updates of a round are wrong in the same way, and enough of them: then it is not the clients.

    A fault of the framework strikes alike whoever is alike, and anybody can send wrong checksums. So the run stops if
    the same is found at all, at least two, or at half, at least three, of those it can have happened to: the clients of
    the round, those of a tier, or those who were to train the expert it is about.

    Args:
        proofs: Of all updates of a round that got so far.
    """
    for fact, flawed in _by_fact(proofs).items():
        groups: dict[Hashable, set[int]] = defaultdict(set)
        for proof in proofs:
            for group in ("round", proof.tier, *proof.trainable):
                groups[group].add(proof.client)
        about: dict[Hashable, set[int]] = defaultdict(set)
        for client, proof in flawed.items():
            assert proof.flaw is not None
            for group in ("round", proof.tier, *proof.flaw.experts):
                about[group].add(client)
        if any(_ours(len(clients), len(groups[group])) for group, clients in about.items()):
            first, *others = sorted(flawed)
            also = f", and so did {', '.join(map(str, others))} ({fact})" if others else ""
            raise TrainingError(
                f"round {flawed[first].round}: client {first} {flawed[first].flaw}{also}. The round would average "
                "weights that were not trained as planned, so the run stops; this is a fault in the framework or in a "
                "custom strategy or layout, or these clients act together."
            )


def _by_fact(proofs: Iterable[Proof]) -> dict[str, dict[int, Proof]]:
    """Flawed updates by what is wrong with them, and by client."""
    found: dict[str, dict[int, Proof]] = defaultdict(dict)
    for proof in proofs:
        if proof.flaw is not None:
            found[proof.flaw.fact][proof.client] = proof
    return found


def _ours(flawed: int, all_: int) -> bool:
    return flawed >= 2 and (flawed == all_ or (flawed >= _SAME_ERROR and 2 * flawed >= all_))
