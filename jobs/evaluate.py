"""Evaluating a run as a Ray job: what `hfedmoe evaluate` does, on the node where the run's checkpoints are.

    ray job submit --runtime-env jobs/runtime_env.yaml --entrypoint-label-selector '{"hfedmoe-role": "server"}' --
        python -u jobs/evaluate.py runs/quickstart --own

A relative RUN is taken from the home directory of that node, where `jobs/federate.py` puts it. On a cluster that
`hfedmoe cluster render` did not make, leave the label out, or name the node by another one.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from hfedmoe_ray.cli import main as hfedmoe


def main(arguments: Sequence[str]) -> int:
    """Runs `RUN [arguments of hfedmoe evaluate ...]` and returns the exit code."""
    if not arguments or arguments[0].startswith("-"):
        return hfedmoe(["evaluate", *arguments])
    run, *others = arguments
    return hfedmoe(["evaluate", str(Path.home() / run), *others])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
