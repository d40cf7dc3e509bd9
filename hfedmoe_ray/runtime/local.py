"""The executor of `backend: local`: every client in this one process, one after another, for a debugger.

Results are those of the Ray executor, bit for bit: both run the same worker, which computes on one thread.
"""

import platform
import time
import traceback
from collections.abc import Generator, Sequence

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.federation.executor import Further, Notify, nothing_further
from hfedmoe_ray.moe.derived import bits_of, merged_expert, quantised_expert
from hfedmoe_ray.records import NodeUsage
from hfedmoe_ray.runtime.overlay import overlay, read_only, view
from hfedmoe_ray.runtime.usage import UsageMeter
from hfedmoe_ray.runtime.worker import (
    Worker,
    WorkerFactory,
    client_worker,
    last_line,
    late_reason,
    out_of_memory,
    unreadable,
)
from hfedmoe_ray.trust.foreign_text import printable
from hfedmoe_ray.types import ClientTask, Status, TaskResult, TaskWeights, Weights
from hfedmoe_ray.wire import parse_metrics

VERSIONS_KEPT = 2
"""The current version of the weights, and the one before it for tasks that started from it."""


class LocalExecutor:
    """Runs tasks in client order in the calling thread (see `federation.executor.Executor`)."""

    runs_elsewhere = False
    has_gpus = False

    def __init__(self, context: RunContext, *, worker_factory: WorkerFactory = client_worker) -> None:
        self._context = context
        self._worker_factory = worker_factory
        self._worker: Worker | None = None
        self._versions: dict[int, Weights] = {}
        self._meter = UsageMeter()

    def publish(self, weights: Weights, keep: frozenset[int] = frozenset()) -> None:
        """See `Executor.publish`."""
        self._versions[weights.version] = weights
        for version in sorted(self._versions)[:-VERSIONS_KEPT]:
            if version not in keep:
                del self._versions[version]

    def run(
        self, tasks: Sequence[ClientTask], notify: Notify, further: Further = nothing_further
    ) -> Generator[TaskResult, None, None]:
        """See `Executor.run`. A model that cannot be loaded raises here; that is nobody's client failing."""
        if self._worker is None:
            self._worker = self._worker_factory(self._context)
        ready = sorted(tasks, key=lambda task: task.client)
        while ready:
            yield self._execute(self._worker, ready.pop(0), notify)
            ready += sorted(further(), key=lambda task: task.client)

    def usage(self) -> tuple[NodeUsage, ...]:
        """See `Executor.usage`."""
        return (NodeUsage(node=0, name=platform.node(), **self._meter.read()),)

    def close(self) -> None:
        """See `Executor.close`."""
        self._meter.close()
        self._worker = None
        self._versions.clear()

    def _execute(self, worker: Worker, task: ClientTask, notify: Notify) -> TaskResult:
        """One task to its result; the deadline is checked wherever the worker asks whether to stop."""
        fields = {"client": task.client, "round": task.round, "kind": task.kind}
        weights = task_weights(self._versions[task.version], task)
        notify("task_started", {**fields, "attempt": 1})
        limit = self._context.experiment.runtime.deadline_s
        started = time.monotonic()

        def expired() -> bool:
            return time.monotonic() - started > limit

        payload, state, metrics, reason = b"", b"", None, ""
        status: Status = "ok"
        try:
            payload, answer, state = worker.execute(task, weights, expired)
        except Exception as error:
            if expired():
                status, reason = "late", late_reason(limit)
            else:
                status, reason = ("memory" if out_of_memory(error) else "failed"), last_line(error)
                notify("task_error", {**fields, "traceback": printable(traceback.format_exc())})
        else:
            try:
                metrics = parse_metrics(answer)
            except ValueError as error:
                status, reason = "rejected", unreadable(error)
        outcome = {"status": status, "reason": reason, "attempts": 1, "seconds": time.monotonic() - started}
        notify("task_finished", {**fields, **outcome})
        if metrics is None:
            return TaskResult(task=task, status=status, reason=reason)
        return TaskResult(
            task=task,
            status="ok",
            metrics=metrics,
            payload=lambda: payload,
            payload_bytes=len(payload),
            state=(lambda: state) if state else None,
            state_bytes=len(state),
        )


def task_weights(weights: Weights, task: ClientTask) -> TaskWeights:
    """What `task` reads of a version, as read-only views, and the client's state."""
    own = None if task.personal is None else (weights.personal or {}).get(task.personal)
    experts = overlay(weights.experts, weights.experts, own.experts if own else {})
    return TaskWeights(
        shared=read_only({**weights.shared, **(own.shared if own else {})}),
        experts={
            key: read_only(
                experts[key] if (bits := bits_of(task.plan, key)) is None else quantised_expert(experts[key], bits)
            )
            for key in task.plan.present
        },
        merged=tuple(read_only(merged_expert(one, experts)) for one in task.plan.merged),
        means=view(weights.means) if weights.means is not None and task.plan.needs_means else None,
        state=task.state() if task.state is not None else b"",
    )
