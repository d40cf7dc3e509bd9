"""How long the next task will take, from how long those before took: what longest-first placement goes by.

It decides in which order tasks start, never what they compute, so it is not part of a checkpoint.
"""

from hfedmoe_ray.types import ClientTask, TaskKind


class Durations:
    """Seconds of finished tasks."""

    def __init__(self) -> None:
        """Knows nothing yet."""
        self._own: dict[tuple[TaskKind, int], float] = {}
        """Of a client's last task of a kind."""
        self._total: dict[tuple[TaskKind, str], tuple[float, int]] = {}
        """(sum, count) over the tasks of a tier."""

    def add(self, task: ClientTask, tier: str, seconds: float) -> None:
        """Notes how long a task took in its process."""
        self._own[task.kind, task.client] = seconds
        total, count = self._total.get((task.kind, tier), (0.0, 0))
        self._total[task.kind, tier] = (total + seconds, count + 1)

    def predict(self, kind: TaskKind, client: int, tier: str, experts: int) -> float:
        """Returns what a task will take: what the client took last, else its tier on average, else by its experts.

        Args:
            kind: Of the task.
            client: Whose.
            tier: The client's.
            experts: It holds in this task; before anything was measured, tasks of more are taken for longer.
        """
        own = self._own.get((kind, client))
        if own is not None:
            return own
        total, count = self._total.get((kind, tier), (0.0, 0))
        if count:
            return total / count
        measured = [(total, count) for (of, _), (total, count) in self._total.items() if of == kind]
        if not measured:
            return float(experts)
        return sum(total for total, _ in measured) / sum(count for _, count in measured)
