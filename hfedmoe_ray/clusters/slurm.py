"""A Slurm batch script: a job with a component for each group of nodes, which starts Ray and submits a run to it."""

import json
import shlex
from collections.abc import Sequence
from itertools import accumulate

from hfedmoe_ray.clusters.design import ClusterDesign, NodeGroup
from hfedmoe_ray.clusters.document import Part, comment
from hfedmoe_ray.packing import GIB

DIRECTIVE = "#SBATCH"
NEXT_COMPONENT = f"{DIRECTIVE} hetjob"


class SbatchOptions(Part):
    """Options of one component of the job, named as sbatch does with dashes for underscores."""

    job_name: str | None = None
    output: str | None = None
    time: str | None = None
    nodes: int
    ntasks_per_node: int = 1
    cpus_per_task: int
    mem: str
    gpus_per_node: int | None = None

    def lines(self) -> list[str]:
        """As directives of a batch script."""
        named = self.model_dump(exclude_none=True).items()
        return [f"{DIRECTIVE} --{name.replace('_', '-')}={value}" for name, value in named]


_SCRIPT = """\
set -euo pipefail

cd "$SLURM_SUBMIT_DIR"
export PATH="$PWD/.venv/bin:$PATH"
# A token for this job alone: without it, whoever reaches the head can run code in the cluster.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

# Jobs of several people may share a machine, and so may components of this one: no port or directory is fixed.
head=$(hostname -I | cut -d' ' -f1)
port=$((20000 + SLURM_JOB_ID % 10000))
dashboard=$((30000 + SLURM_JOB_ID % 10000))
agent=$((40000 + SLURM_JOB_ID % 10000))
client=$((50000 + SLURM_JOB_ID % 10000))
shared=(--block --disable-usage-stats --min-worker-port=0 --max-worker-port=0)

# Returns when so many nodes are there; ends the job after five minutes. Nodes that start at once on one machine choose
# the same names for their sockets, so each group waits for the one before.
nodes_are() {{
  timeout 300 python - "$head:$port" "$1" <<'PYTHON'
import socket, sys, time
address, nodes = sys.argv[1], int(sys.argv[2])
while True:
    try:
        socket.create_connection(address.split(":"), timeout=1).close()
        break
    except OSError:
        time.sleep(1)
import ray
ray.init(address, log_to_driver=False, logging_level="ERROR")
while sum(node["Alive"] for node in ray.nodes()) < nodes:
    time.sleep(1)
PYTHON
}}

echo "head at $head:$port"
srun --het-group=0 ray start "${{shared[@]}}" --head --node-ip-address="$head" --port=$port \\
  --ray-client-server-port=$client --dashboard-agent-listen-port=$agent --dashboard-host=127.0.0.1 \\
  --dashboard-port=$dashboard --temp-dir="/tmp/hfedmoe-$SLURM_JOB_ID" \\
  {head} &
nodes_are 1
{workers}

# The run's record is fetched to ./runs; its checkpoints are below $HOME/runs, which the nodes share on most sites.
hfedmoe submit {arguments} --address "http://127.0.0.1:$dashboard"
"""


def slurm_script(design: ClusterDesign, arguments: Sequence[str], header: str) -> str:
    """Returns the text of the script.

    Args:
        design: The nodes.
        arguments: Configuration and overrides, for `hfedmoe submit`.
        header: What it is, for people.
    """
    components = [options.lines() for options in sbatch_components(design)]
    directives = f"\n{NEXT_COMPONENT}\n".join("\n".join(lines) for lines in components)
    there = accumulate((group.maximum for group in design.workers), initial=1)
    next(there)
    workers = "\n".join(
        f'srun --het-group={number} ray start "${{shared[@]}}" --address="$head:$port" '
        f"--dashboard-agent-listen-port=0 \\\n  {_start_options(group)} &\nnodes_are {nodes}"
        for number, (group, nodes) in enumerate(zip(design.workers, there, strict=True), start=1)
    )
    body = _SCRIPT.format(
        head=_start_options(design.head),
        workers=workers,
        arguments=shlex.join(arguments),
    )
    return f"#!/bin/bash\n{comment(header)}{directives}\n{body}"


def sbatch_components(design: ClusterDesign) -> list[SbatchOptions]:
    """The components of the job: the head first."""
    return [
        SbatchOptions(
            nodes=group.maximum,
            cpus_per_task=group.cores,
            mem=f"{group.memory_gib}G",
            gpus_per_node=group.gpus or None,
            job_name="hfedmoe" if group is design.head else None,
            output="%x-%j.log" if group is design.head else None,
            time="06:00:00" if group is design.head else None,
        )
        for group in (design.head, *design.workers)
    ]


def _start_options(group: NodeGroup) -> str:
    options = [f"--num-cpus={group.client_cpus}", f"--object-store-memory={group.store_gib * GIB}"]
    if group.client_gib:
        options.append(f"--memory={group.client_gib * GIB}")
    options.append("--labels=" + ",".join(f"{key}={value}" for key, value in group.labels.items()))
    if group.resources:
        options.append(f"--resources={shlex.quote(json.dumps(dict(group.resources)))}")
    return " ".join(options)
