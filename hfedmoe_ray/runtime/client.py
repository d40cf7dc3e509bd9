"""The client actor: a process with the resources of one client's budget, in which clients' tasks run.

It keeps the frozen base model and nothing of any client, so it serves a task of any client, and one that dies loses
nothing that another could not compute again.
"""

import gc
import os
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray

from hfedmoe_ray.budget import tier_of
from hfedmoe_ray.context import RunContext
from hfedmoe_ray.packing import GIB
from hfedmoe_ray.runtime import timeouts
from hfedmoe_ray.runtime.cap import capped, marked
from hfedmoe_ray.runtime.transfer import Directory
from hfedmoe_ray.runtime.weights import TaskRefs
from hfedmoe_ray.runtime.worker import Worker, WorkerFactory, last_line, out_of_memory
from hfedmoe_ray.train.memory import Spare, return_freed_memory
from hfedmoe_ray.types import Array, ClientTask

Answer = tuple[Literal["ok", "stopped", "failed", "memory", "rejected"], bytes, str]
"""How a task went; metrics as JSON, or the traceback; the traceback's last line. ("rejected" no client says of itself.)
"""
Reply = tuple[Array, Answer]
"""A client's new state, as uint8 (empty: as it was), and the answer: one object, as each costs time."""


@dataclass(frozen=True)
class Loading:
    """How loading went."""

    pid: int
    missing: tuple[str, ...]
    """Directories this node lacks, to be offered with their files; empty when the model is loaded."""
    gpu: str = ""
    """The GPU that this actor shares with others, where it waits to be told who holds the frozen tensors there."""
    model: Path | None = None
    """Directory of the prepared model on this node."""


class ClientActor:
    """Serves one task at a time, while `ping` is answered beside it."""

    def __init__(self, context: RunContext, worker_factory: WorkerFactory, gpu_share: float) -> None:
        """Takes note of the run; nothing heavy is imported before `load`.

        Args:
            context: The run, with paths of the server's node.
            worker_factory: Makes the worker, once the files are here.
            gpu_share: Share of the GPU's memory this process may allocate (0: no GPU).
        """
        self._context = context
        self._worker_factory = worker_factory
        self._gpu_share = gpu_share
        self._worker: Worker | None = None
        self._tiers = tier_of(context.experiment.clients)
        self._spare = Spare()

    def load(self, directories: Mapping[str, Directory], holder: Any = None) -> Loading:
        """Loads the model, unless this node lacks files, or the holder of a GPU that clients share is not known yet.

        Args:
            directories: "model" and "data" where this is another node than the server's, else empty.
            holder: The actor that has the frozen tensors of this process's GPU (`holder.FrozenHolder`).
        """
        found = {name: directory.find() for name, directory in directories.items()}
        missing = tuple(name for name, path in found.items() if path is None)
        if missing:
            return Loading(os.getpid(), missing)
        context = _moved(self._context, {name: path for name, path in found.items() if path is not None})
        shared_gpu = _visible_gpu() if 0 < self._gpu_share < 1 else ""
        if shared_gpu and holder is None:
            return Loading(os.getpid(), (), shared_gpu, context.model.path)
        if holder is None:
            self._worker = self._worker_factory(context)
        else:
            self._worker = self._worker_factory(context, frozen=self._aliased(holder))
        return Loading(os.getpid(), ())

    def _aliased(self, holder: Any) -> dict[str, Any]:
        """The holder's tensors; what is left of the GPU is capped to this client's share before they are opened."""
        from hfedmoe_ray.moe.sharing import alias

        handles = ray.get(holder.handles.remote(), timeout=timeouts.FETCH)
        cap_gpu_memory(self._gpu_share, sum(handle.nbytes for handle in handles.values()))
        return alias(handles)

    @ray.method(num_returns=2)
    def execute(self, task: ClientTask, refs: TaskRefs) -> tuple[Array, Reply]:
        """Runs one task.

        Returns:
            The payload as uint8, which stays in the object store until somebody reads it, and the reply. An exception
            of the client's code is an answer: only plain text crosses the boundary, and the actor lives on.

        Raises:
            ray.exceptions.RayError: the weights could not be fetched.
        """
        with self._spare.working():
            return self._execute(task, refs)

    def _execute(self, task: ClientTask, refs: TaskRefs) -> tuple[Array, Reply]:
        assert self._worker is not None, "execute before load"
        weights = refs.fetch()
        canceled = ray.get_runtime_context().is_canceled
        try:
            with self._limits(task):
                return answered(self._worker.execute(task, weights, canceled))
        except Exception as error:
            status: Literal["failed", "memory"] = "memory" if out_of_memory(error) else "failed"
            answer: Answer = (status, traceback.format_exc().encode(), last_line(error))
            if canceled():
                answer = ("stopped", b"", last_line(error))
        # Only now that its traceback is gone is what the task held garbage; the next one needs the room.
        gc.collect()
        return_freed_memory()
        return NOTHING, (NOTHING, answer)

    @contextmanager
    def _limits(self, task: ClientTask) -> Iterator[None]:
        """Limits what a client does on its own device to the memory it has there.

        On a GPU it is limited there, for good. An evaluation measures the model for the server.
        """
        free = self._gpu_share or not self._context.experiment.runtime.memory_cap
        if free or task.kind not in ("profile", "train"):
            yield
            return
        budget = int(self._tiers[task.client].memory_gib * GIB)
        with marked(ray.get_runtime_context().get_actor_id(), budget), capped(budget):
            yield

    @ray.method(concurrency_group="lifeline")
    def live(self) -> None:
        """Never answers: the caller's reference becomes ready, with an error, when this process dies."""
        threading.Event().wait()

    @ray.method(concurrency_group="health")
    def ping(self) -> dict[str, Any]:
        """Process id, node id and assigned resources; answered while a task runs."""
        runtime = ray.get_runtime_context()
        return {"pid": os.getpid(), "node": runtime.get_node_id(), "resources": runtime.get_assigned_resources()}


def answered(done: tuple[bytes, bytes, bytes]) -> tuple[Array, Reply]:
    """What `execute` returns of a worker's (payload, metrics, state)."""
    payload, metrics, state = done
    return np.frombuffer(payload, dtype=np.uint8), (np.frombuffer(state, dtype=np.uint8), ("ok", metrics, ""))


NOTHING = np.empty(0, dtype=np.uint8)

RemoteClient: Any = ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups={"health": 1, "lifeline": 1})(
    ClientActor
)


def _moved(context: RunContext, paths: Mapping[str, Path]) -> RunContext:
    """The context with the paths of this node."""
    return replace(
        context,
        model=replace(context.model, path=paths.get("model", context.model.path)),
        data=replace(context.data, path=paths.get("data", context.data.path)),
    )


def _visible_gpu() -> str:
    """The GPU that Ray gave this process, as CUDA_VISIBLE_DEVICES names it; empty where torch sees none."""
    import torch

    return os.environ.get("CUDA_VISIBLE_DEVICES", "0") if torch.cuda.is_available() else ""


def cap_gpu_memory(share: float, held: int = 0) -> None:
    """Makes the budget's share of the GPU a hard limit; Ray itself limits nothing.

    Args:
        share: Of the GPU, or of what is left of it.
        held: Bytes on it that all clients share and none is charged for.
    """
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(capped_fraction(share, held, total))


def capped_fraction(share: float, held: int, total: int) -> float:
    """Returns the fraction of a GPU of `total` bytes that a client may allocate: its share of what is not `held`."""
    return share * max(0, total - held) / total
