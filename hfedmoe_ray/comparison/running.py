"""Carrying out a comparison: what is finished is kept, what is half done goes on, what fails fails alone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from hfedmoe_ray.comparison.design import Design, Run
from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.errors import ConfigError, HFedMoEError

Stage = Literal["finished", "half done", "new"]
Show = Callable[[str, "Run | None", dict[str, Any]], None]
"""Told (event, run, fields): "preparing", "started", "round", "finished" or "failed"."""
_GRACE_S = 10.0
"""How long a process may take to end once it is told to."""
_IRRELEVANT = {"output", "backend", "actors", "runtime", "tracking", "compare"}
"""Sections that no figure depends on."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that did not finish."""

    run: Run
    reason: str
    log: Path


@dataclass
class _Children:
    """The processes that run, so that all of them can be ended."""

    processes: set[subprocess.Popen[str]] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopping: bool = False

    def start(self, command: Sequence[str], environment: dict[str, str], log: IO[str]) -> subprocess.Popen[str] | None:
        """Starts a process in a session of its own, which Ctrl-C does not reach; None if all are to end."""
        with self.lock:
            if self.stopping:
                return None
            process = subprocess.Popen(
                command,
                env=environment,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
            self.processes.add(process)
            return process

    def end(self) -> None:
        """Ends every process and what it has started; checkpoints are complete at every instant."""
        with self.lock:
            self.stopping = True
            running = [process for process in self.processes if process.poll() is None]
        for process in running:
            os.killpg(process.pid, signal.SIGTERM)
        until = time.monotonic() + _GRACE_S
        for process in running:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def stage_of(run: Run) -> Stage:
    """Returns how far a run is, from its directory.

    Raises:
        ConfigError: the directory holds a run of another configuration.
    """
    directory = run.directory
    if not (directory / "config.yaml").is_file():
        return "new"
    _check_same(run)
    summary = directory / "summary.json"
    if summary.is_file() and json.loads(summary.read_text(encoding="utf-8")).get("status") == "finished":
        return "finished"
    return "half done" if (directory / "checkpoints" / "LATEST").is_file() else "new"


def carry_out(design: Design, *, processes: int | None, show: Show) -> list[Failure]:
    """Runs what is not finished and returns what failed.

    Args:
        design: The comparison.
        processes: Runs at a time. Default: as the configuration says, else as many as fit this machine.
        show: Told what happens, in any thread.

    Raises:
        ConfigError: a directory holds a run of another configuration; nothing has been started.
        KeyboardInterrupt: Ctrl-C; what was running can go on from its last checkpoint.
    """
    stages = {run.experiment.name: stage_of(run) for run in design.runs}
    left = [run for run in design.runs if stages[run.experiment.name] != "finished"]
    if not left:
        return []
    ray = [run for run in left if run.experiment.backend == "ray"]
    wanted = processes or design.processes
    if ray and wanted and wanted > 1:
        raise ConfigError(
            f"{ray[0].experiment.name} has `backend: ray`, and such a run takes the whole cluster: its runs take "
            "turns, and each uses all devices. Leave processes out, or write backend=local to run several at a time."
        )
    at_once = 1 if ray else wanted or fitting_processes([run.experiment for run in left])
    children = _Children()
    logs = design.directory / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    show("preparing", None, {"runs": len(left), "finished": len(design.runs) - len(left), "processes": at_once})
    private = bool(ray) and ray[0].experiment.runtime.address is None
    with _cluster() if private else nullcontext(None) as address, ThreadPoolExecutor(at_once) as pool:
        try:
            if at_once > 1:
                # Once, before they would all do it at the same time.
                job = {"kind": "prepare", "experiments": [one.model_dump(mode="json") for one in _distinct(left)]}
                for _ in _messages(children, job, logs / "prepare.log"):
                    pass
            waiting: set[Future[Failure | None]] = {
                pool.submit(
                    _one, children, run, stage=stages[run.experiment.name], address=address, logs=logs, show=show
                )
                for run in left
            }
            failures = []
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                failures += [failure for one in done if (failure := one.result()) is not None]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            children.end()
            raise
    order = [run.experiment.name for run in design.runs]
    return sorted(failures, key=lambda failure: order.index(failure.run.experiment.name))


def fitting_processes(experiments: Sequence[Experiment]) -> int:
    """Runs that this machine's cores and memory have room for, each with one thread."""
    from hfedmoe_ray.moe.shape import read_shape
    from hfedmoe_ray.plan import forecast
    from hfedmoe_ray.runtime.machine import this_machine

    machine = this_machine()
    # A run's process is the server too: beside a client it keeps two versions of the weights.
    needs = [
        2.0 * max(one.memory_bytes for one in forecast(experiment, shape, gpus_available=False))
        for experiment in experiments
        if (shape := read_shape(experiment.model))
    ]
    return max(1, min(int(machine.cpus), int(machine.memory_bytes / max(needs))))


def _one(children: _Children, run: Run, *, stage: Stage, address: str | None, logs: Path, show: Show) -> Failure | None:
    """Carries out one run in a process of its own."""
    job = {
        "kind": "run",
        "experiment": run.experiment.model_dump(mode="json"),
        "run_dir": str(run.directory),
        "resume": stage == "half done",
        "address": address,
    }
    log = logs / f"{run.experiment.name}.log"
    show("started", run, {"resumed": stage == "half done"})
    started, reason = time.monotonic(), ""
    try:
        for message in _messages(children, job, log):
            if message["event"] == "round":
                show("round", run, message)
            elif message["event"] == "error":
                reason = message["message"]
    except ChildProcessError as error:
        failure = Failure(run=run, reason=reason or str(error), log=log)
        if not children.stopping:
            show("failed", run, {"reason": failure.reason, "log": str(log)})
        return failure
    show("finished", run, {"seconds": time.monotonic() - started})
    return None


def _messages(children: _Children, job: dict[str, Any], log: Path) -> Iterator[dict[str, Any]]:
    """Starts a process with a job and yields what it tells, to its end.

    Raises:
        ChildProcessError: it ended otherwise than well.
    """
    command = [sys.executable, "-m", "hfedmoe_ray.comparison.child"]
    with log.open("w", encoding="utf-8") as stream:
        process = children.start(command, _environment(), stream)
        if process is None:
            raise ChildProcessError("the comparison was interrupted before this run began")
        assert process.stdin is not None and process.stdout is not None
        # One that has ended before it took the job says why by its code.
        with process.stdout, suppress(BrokenPipeError), process.stdin:
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
            for line in process.stdout:
                yield json.loads(line)
            code = process.wait()
    if code < 0:
        raise ChildProcessError(f"its process was ended by {signal.Signals(-code).name}, from outside or for memory")
    if code:
        raise ChildProcessError(f"its process ended with code {code}")


def _environment() -> dict[str, str]:
    """This process's variables, one thread for each library, and this very package."""
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def _distinct(runs: Sequence[Run]) -> list[Experiment]:
    """One experiment for each model and data that have to be prepared."""
    found: dict[str, Experiment] = {}
    for run in runs:
        made = run.experiment
        parts = [made.model.model_dump(mode="json"), made.data.model_dump(mode="json"), made.clients.count, made.seed]
        found.setdefault(json.dumps(parts, sort_keys=True), made)
    return list(found.values())


def _check_same(run: Run) -> None:
    """Refuses to go on in the directory of a run that was configured otherwise."""
    path = run.directory / "config.yaml"
    mend = (
        f"Write another directory (--output), or delete {run.directory} to have it run anew. Nothing has been started."
    )
    try:
        before = load_experiment(path).model_dump(mode="json", exclude=_IRRELEVANT)
    except HFedMoEError as error:
        raise ConfigError(f"{run.directory} holds a run that cannot be read any more: {error} {mend}") from None
    now = run.experiment.model_dump(mode="json", exclude=_IRRELEVANT)
    if before != now:
        key, old, new = next(_differences(before, now, ""))
        raise ConfigError(
            f"{run.directory} holds a run of another configuration: there {key} is {old}, here it is {new}. Comparing "
            f"the two would mislead. {mend}"
        )


def _differences(before: Any, now: Any, above: str) -> Iterator[tuple[str, Any, Any]]:
    """Yields (key, value before, value now) where two configurations differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from _differences(before.get(key), now.get(key), f"{above}.{key}" if above else key)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for number, pair in enumerate(zip(before, now, strict=True)):
            yield from _differences(*pair, f"{above}.{number}")
    elif before != now:
        yield above, before, now


@contextmanager
def _cluster() -> Iterator[str]:
    """One private cluster for all runs; yields its address."""
    from hfedmoe_ray.runtime.cluster import connected, gcs_address

    with connected(None):
        yield gcs_address()
