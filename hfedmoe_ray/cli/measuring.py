"""The command that measures what this framework claims: `bench`."""

import os
import subprocess
import sys
from pathlib import Path

import click

from hfedmoe_ray.cli.app import examples
from hfedmoe_ray.errors import ConfigError

BENCHMARKS = {
    "memory": "a client's private memory at 12.5, 25, 50 and 100 % of the experts, and ten clients on a node",
    "prediction": "what plan says a client will need of memory, against what it is seen to need, by tier",
    "step": "DeepSpeed against bare PyTorch, what absent and masked experts save, selection, the prefix cache",
    "gpu": "fractional clients on one GPU at the real sizes of a published model: tokens a second and memory",
    "orchestration": "a round without the clients' work, of 8 and of 300 clients, and clients at work at once",
    "efficiency": "the share of a round's time that is training, against bare PyTorch",
    "scale": "500 clients on this machine: memory of all processes, seconds of a round against one of 50 clients",
    "registered": "10 000 registered clients against 100: seconds until the first task, and of a round of four",
    "peers": "seconds of a round, memory, and what survives faults, against the newest Flower simulation",
    "harness": "multiple-choice and written scores against those of lm-evaluation-harness, item by item",
    "packing": "tokens a second of a training step on short texts, packed into rows and padded",
    "fuzz": "100 000 hostile updates against the code that receives them, and a second opinion on each",
    "bytes": "what an update weighs against what was trained, in every precision",
    "secure": "secure aggregation: bytes and seconds of 10, 50 and 100 clients, and of the server",
}
_REPOSITORY = Path(__file__).parents[2]


@click.command(
    short_help="Measure memory, time or bytes on this machine.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    epilog="\b\n"
    + "\n".join(f"{name:13} {what}" for name, what in BENCHMARKS.items())
    + "\n\n"
    + examples("hfedmoe bench memory --json memory.json"),
)
@click.argument("name", type=click.Choice(list(BENCHMARKS)))
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def bench(name: str, options: tuple[str, ...]) -> int:
    """Run a benchmark of jobs/benchmark/ on this machine; --json FILE keeps its figures.

    All take --json FILE and --help; further options are each benchmark's own.
    """
    script = _REPOSITORY / "jobs" / "benchmark" / f"{name}.py"
    if not script.is_file():
        raise ConfigError(
            f"hfedmoe bench needs {script.relative_to(_REPOSITORY)}, a part of the repository but not "
            "of the installed package. Clone the repository, install it from there (pip install -e .), repeat this."
        )
    # A process of its own: what is measured must not share memory with this one, and it imports this very package.
    path = os.pathsep.join(filter(None, [str(_REPOSITORY), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(script), *options]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False).returncode
