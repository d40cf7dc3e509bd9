"""Clients that drop out of a round: by chance, at a rate that a study sets, or because a round has enough (ours)."""

from collections.abc import Iterable, Mapping, Sequence

from hfedmoe_ray.seeds import generator
from hfedmoe_ray.types import ClientTask, TaskResult

_ENOUGH = "the round had its {count} updates; more clients were asked than it needs (clients.over_select)"
_REASON = "dropped out after training: clients.failure_rate is {rate:g}"


def drops_out(rate: float, seed: int, round: int, client: int) -> bool:
    """Whether a client drops out of a round.

    The draw depends on nothing but (seed, round, client): not on who else takes part. Whoever drops out at one rate
    also does at every higher one, so that runs at several rates differ by the added failures alone.
    """
    return bool(generator(seed, "failure", round, client).random() < rate)


def without_dropouts(results: Iterable[TaskResult], rate: float) -> list[TaskResult]:
    """Returns the results, in their order, those of clients that drop out without what they trained.

    Args:
        results: How the tasks of a round ended.
        rate: Chance that a client's update is lost, 0 to 1.
    """
    return [
        result
        if result.status != "ok" or not drops_out(rate, result.task.seed, result.task.round, result.task.client)
        else TaskResult(
            task=result.task,
            status="dropped",
            metrics=result.metrics,
            reason=_REASON.format(rate=rate),
            attempts=result.attempts,
        )
        for result in results
    ]


def with_dropped(tasks: Sequence[ClientTask], results: Mapping[int, TaskResult]) -> list[TaskResult]:
    """Returns a result per task, in client order; whoever was still at work when the round had enough is dropped.

    Args:
        tasks: Of the round.
        results: By client, of those that have ended.
    """
    reason = _ENOUGH.format(count=sum(result.status == "ok" for result in results.values()))
    return [
        results.get(task.client) or TaskResult(task=task, status="dropped", reason=reason)
        for task in sorted(tasks, key=lambda task: task.client)
    ]
