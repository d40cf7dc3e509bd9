"""What a private cluster does without: processes of Ray's head node that nothing of ours asks.

Beside its two servers and two agents Ray starts a web server, which without a dashboard only sends usage statistics;
the autoscaler, though there is no other machine to ask for; a reader of log files, whose lines nobody subscribes to;
and a worker for each core before there is any work. On two cores all of these took 208 MiB and half of the time to
start. `ray start` has options for two of them, `ray.init` for none, so its own defaults are changed while it runs.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from ray._private import node, parameter

SYSTEM_CONFIG = {"prestart_worker_first_driver": False}
"""For `ray.init`: workers start when they are asked for."""


@contextmanager
def none_to_spare() -> Iterator[None]:
    """Within the block `ray.init` starts a head node without them."""
    parameters, start_web_server = parameter.RayParams, node.Node.start_api_server
    parameter.RayParams = partial(parameters, include_log_monitor=False, no_monitor=True)
    node.Node.start_api_server = _not_started
    try:
        yield
    finally:
        parameter.RayParams, node.Node.start_api_server = parameters, start_web_server


def _not_started(_node: Any, **_options: Any) -> None:
    """Stands in for a process that is not needed."""
