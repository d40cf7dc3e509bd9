"""What executors ask of whoever does a client's work. Free of Ray and of torch."""

import sys
import traceback
from collections.abc import Callable, Mapping
from errno import ENOMEM
from typing import Any, Protocol

from hfedmoe_ray.context import RunContext
from hfedmoe_ray.train.environment import lean_imports
from hfedmoe_ray.trust.foreign_text import one_line
from hfedmoe_ray.types import ClientTask, TaskWeights


class Worker(Protocol):
    """What serves clients: `train.local.ClientWorker`, or a smaller one in a test of the runtime itself."""

    def execute(
        self, task: ClientTask, weights: TaskWeights, should_stop: Callable[[], bool]
    ) -> tuple[bytes, bytes, bytes]:
        """Runs one task and returns the payload, the metrics and the client's new state (empty: as it was).

        Raises any exception once `should_stop` is true.
        """


WorkerFactory = Callable[..., Worker]
"""Of a `RunContext` and, on a GPU that clients share, `frozen`: the tensors its holder has (`moe.sharing`)."""


def client_worker(context: RunContext, frozen: Mapping[str, Any] | None = None) -> Worker:
    """The real worker. Imports torch, transformers and DeepSpeed on its first call in a process."""
    with lean_imports():
        from hfedmoe_ray.train.local import ClientWorker

    return ClientWorker(context, frozen)


_NO_MEMORY = ("can't allocate memory", "not enough memory", "std::bad_alloc")
"""What native code says where it reports a failed allocation as a RuntimeError: torch on a CPU, and C++ at large."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the host or on a GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == ENOMEM
    told = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in told for words in _NO_MEMORY)
    )


def last_line(error: BaseException) -> str:
    """An error as the last line of its traceback, such as "ValueError: no examples"."""
    return one_line("".join(traceback.format_exception_only(error)).strip().splitlines()[-1])


def late_reason(limit: float) -> str:
    """Why a task that was stopped counts as late."""
    return f"not finished within runtime.deadline_s ({limit:g} s)"


def unreadable(error: ValueError) -> str:
    """Why an answer whose metrics cannot be parsed is rejected; the error quotes what the client sent."""
    return one_line(f"its metrics cannot be read: {error}")
