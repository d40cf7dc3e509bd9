"""How a task ended on an actor, as the round loop wants it: its result, and Ray's errors in one line."""

import re
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from hfedmoe_ray.federation.executor import Notify
from hfedmoe_ray.runtime import timeouts
from hfedmoe_ray.runtime.slot import Attempt, Delivered
from hfedmoe_ray.runtime.worker import last_line, unreadable
from hfedmoe_ray.trust.foreign_text import one_line, printable
from hfedmoe_ray.types import ClientTask, Status, TaskResult
from hfedmoe_ray.wire import parse_metrics

MOST_TRACE = 2**16
"""Bytes of a traceback that are kept: its end."""
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


def decided(attempt: Attempt, delivered: Delivered, seconds: float, notify: Notify) -> TaskResult:
    """The result of a task that its actor has answered; what the client says of it is only text until it is parsed."""
    status, body, reason = delivered.answer
    if status == "ok":
        try:
            metrics = parse_metrics(body)
        except ValueError as error:
            return finished(attempt, "rejected", unreadable(error), seconds, notify)
        notify("task_finished", about(attempt.task) | _outcome(attempt, "ok", "", seconds))
        return TaskResult(
            task=attempt.task,
            status="ok",
            metrics=metrics,
            payload=Payload(delivered.payload),
            payload_bytes=delivered.payload_bytes,
            state=delivered.state,
            state_bytes=delivered.state_bytes,
            attempts=attempt.number,
        )
    if body:
        trace = printable(body[-MOST_TRACE:].decode(errors="replace"))
        notify("task_error", about(attempt.task) | {"traceback": trace})
    ended: Status = status if status in ("memory", "rejected") else "failed"
    return finished(attempt, ended, one_line(reason), seconds, notify)


def finished(attempt: Attempt, status: Status, reason: str, seconds: float, notify: Notify) -> TaskResult:
    """The result of a task that leaves nothing to be used, told to `notify` as well."""
    notify("task_finished", about(attempt.task) | _outcome(attempt, status, reason, seconds))
    return TaskResult(task=attempt.task, status=status, reason=reason, attempts=attempt.number)


def _outcome(attempt: Attempt, status: Status, reason: str, seconds: float) -> dict[str, Any]:
    return {"status": status, "reason": reason, "attempts": attempt.number, "seconds": seconds}


def told(error: RayError) -> str:
    """Ray's error in one line: the client's own last line where there is one."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    if isinstance(cause, BaseException):
        return last_line(cause)
    lines = _COLOURS.sub("", str(error)).strip().splitlines() or [""]
    # What failed in the actor's creation stands in the last line, why a process died in the first.
    return f"{type(error).__name__}: {lines[-1 if 'creation task' in lines[0] else 0].strip()}"
