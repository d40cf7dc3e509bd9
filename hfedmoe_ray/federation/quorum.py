"""When too few clients deliver, or too many for the same reason do not."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from hfedmoe_ray.errors import TrainingError
from hfedmoe_ray.types import TaskResult

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
