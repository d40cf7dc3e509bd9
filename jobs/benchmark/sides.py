"""How the two sides of `hfedmoe bench peers` are started: Flower in an environment of its own, ours in this one."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfedmoe_ray.context import RunContext, cache_dir

REPOSITORY = Path(__file__).parents[2]
BENCHMARK = REPOSITORY / "jobs" / "benchmark"
CONFIG = REPOSITORY / "configs" / "quickstart.yaml"
PINNED = ("torch", "transformers", "safetensors", "numpy", "tokenizers")
"""What computes is the same version on both sides."""
PACKAGES = ("flwr[simulation]", "torch", "transformers", "safetensors", "pyyaml", "pydantic")
SOURCES = {"PYTHONPATH": os.pathsep.join(map(str, (REPOSITORY, BENCHMARK)))}
FLOWER = SOURCES | {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
"""Environment variables of each side; one thread a client, as ours have."""
PATIENCE_S = 3600.0
"""Flower's own default for how long a round waits for its clients."""


def flower_python() -> Path:
    """The interpreter of Flower's environment, which is made if it is not there."""
    directory = cache_dir().resolve() / "benchmark" / "flower-venv"
    python, constraints = directory / "bin" / "python", directory / "constraints.txt"
    lines = (REPOSITORY / "constraints-cpu.txt").read_text().splitlines()
    pins = "\n".join(line for line in lines if line.partition("==")[0] in PINNED) + "\n"
    if constraints.is_file() and constraints.read_text() == pins:
        return python
    subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
    # Written under its own name only when all is installed: an interrupted attempt is made again.
    draft = directory / "constraints.draft"
    draft.write_text(pins)
    install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(draft), *PACKAGES]
    subprocess.run(install, check=True)
    draft.rename(constraints)
    return python


def flower_command(
    python: Path,
    directory: Path,
    context: RunContext,
    *,
    rounds: int,
    ray: Mapping[str, Any],
    timeout_s: float = PATIENCE_S,
    fault: Mapping[str, str] | None = None,
) -> list[str]:
    """The command of one simulation, whose record will be `directory`/result.json (see `flower/server.py`)."""
    (directory / "context").write_bytes(pickle.dumps(context))
    request = {
        "context": str(directory / "context"),
        "result": str(directory / "result.json"),
        "rounds": rounds,
        "ray": dict(ray),
        "timeout_s": timeout_s,
        "fault": fault,
    }
    (directory / "request.json").write_text(json.dumps(request))
    return [str(python), str(BENCHMARK / "flower" / "server.py"), str(directory / "request.json")]


def our_command(output: Path, keys: Sequence[str]) -> list[str]:
    """The command of one run of the quickstart, whose record will lie below `output`."""
    return [sys.executable, "-m", "hfedmoe_ray.cli", "run", str(CONFIG), *keys, f"output={output}"]


def own_ray(directory: Path, cores: int) -> dict[str, Any]:
    """What `ray.init` is told for a cluster of its own, whose files and sockets lie in `directory` (a short path)."""
    return {"address": "local", "num_cpus": cores, "_temp_dir": str(directory)}
