"""How a task ended on an actor, as the round loop wants it: its result, and Ray's errors in one line."""

import re
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from hfedmoe_ray.federation.executor import Notify
from hfedmoe_ray.runtime import timeouts
from hfedmoe_ray.runtime.slot import Attempt
from hfedmoe_ray.runtime.worker import last_line
from hfedmoe_ray.types import ClientMetrics, ClientTask, Fetch, Status, TaskResult

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Payload:
    """The bytes of an update, left in the object store until they are asked for, once."""

    def __init__(self, ref: Any) -> None:
        """Keeps the reference."""
        self._ref = ref

    def __call__(self) -> bytes:
        """Fetches them."""
        ref, self._ref = self._ref, None
        if ref is None:
            raise RuntimeError("this payload has been fetched before")
        data: bytes = ray.get(ref, timeout=timeouts.FETCH).tobytes()
        return data


def about(task: ClientTask) -> dict[str, Any]:
    """What events say of a task."""
    return {"client": task.client, "round": task.round, "kind": task.kind}


def finished(
    attempt: Attempt,
    status: Status,
    reason: str,
    seconds: float,
    notify: Notify,
    *,
    metrics: ClientMetrics | None = None,
    payload: Fetch | None = None,
    state: Fetch | None = None,
) -> TaskResult:
    """The result of a task, told to `notify` as well."""
    outcome = {"status": status, "reason": reason, "attempts": attempt.number, "seconds": seconds}
    notify("task_finished", about(attempt.task) | outcome)
    return TaskResult(
        task=attempt.task,
        status=status,
        metrics=metrics,
        payload=payload,
        state=state,
        reason=reason,
        attempts=attempt.number,
    )


def told(error: RayError) -> str:
    """Ray's error in one line: the client's own last line where there is one."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    if isinstance(cause, BaseException):
        return last_line(cause)
    lines = _COLOURS.sub("", str(error)).strip().splitlines() or [""]
    # What failed in the actor's creation stands in the last line, why a process died in the first.
    return f"{type(error).__name__}: {lines[-1 if 'creation task' in lines[0] else 0].strip()}"
