"""The process of one run of a comparison, or of the preparation of them all: `python -m hfedmoe_ray.comparison.child`.

A run has a process to itself, so that its peak memory is its own, one that crashes takes no other with it, and the
next starts with nothing left behind. The job comes as one line of JSON on standard input, and what happens goes out
as lines of JSON on standard output; whatever else is printed goes to standard error, the run's log. When standard
input ends, the comparison is gone, and so is this process: its last checkpoint is complete.
"""

import json
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import HFedMoEError
from hfedmoe_ray.records import RoundReport

Tell = Callable[..., None]


def main() -> int:
    """Does the job on standard input and returns the exit code: 0, a refusal's own, or 1 for a bug."""
    tell = _channel()
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        if job["kind"] == "prepare":
            _prepare(job["experiments"], tell)
        else:
            _run(job, tell)
    except HFedMoEError as error:
        tell("error", message=str(error))
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        tell("error", message=f"{type(error).__name__}: {error} (a bug; its traceback is in the log)")
        return 1
    return 0


def _run(job: dict[str, Any], tell: Tell) -> None:
    from hfedmoe_ray.runtime import session

    def render(name: str, fields: Any) -> None:
        if isinstance(fields, RoundReport):
            tell("round", round=fields.round, accuracy=fields.accuracy)
        elif name == "warning":
            print(f"warning: {fields.get('message', '')}", file=sys.stderr, flush=True)

    experiment = Experiment.model_validate(job["experiment"])
    if job["address"]:
        runtime = experiment.runtime.model_copy(update={"address": job["address"]})
        experiment = experiment.model_copy(update={"runtime": runtime})
    run_dir = Path(job["run_dir"])
    session.run(experiment, run_dir, resume=job["resume"], render=render)


def _prepare(experiments: list[Any], tell: Tell) -> None:
    """Prepares the model and data of each; what cannot be prepared is told, and left to the runs that need it."""
    from hfedmoe_ray.prepare import prepare_run

    for number, values in enumerate(experiments, start=1):
        experiment = Experiment.model_validate(values)
        try:
            prepare_run(experiment, Path(experiment.output))
        except HFedMoEError as error:
            print(f"{experiment.name}: {error}", file=sys.stderr, flush=True)
        tell("prepared", count=number)


def _channel() -> Tell:
    """Takes standard output for messages alone, and returns what sends one."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(name: str, **fields: Any) -> None:
        stream.write(json.dumps({"event": name, **fields}) + "\n")
        stream.flush()

    return tell


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
