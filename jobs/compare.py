"""A comparison as a Ray job: what `hfedmoe compare` does, on the cluster the job runs in.

    ray job submit --runtime-env jobs/runtime_env.yaml -- python -u jobs/compare.py configs/compare_20news.yaml

Its runs take turns on the cluster. A job's working directory is deleted when the job ends, so what is written goes
below the home directory of the node unless the configuration's `output`, or `--output`, is absolute.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from hfedmoe_ray.cli import main as hfedmoe
from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.errors import HFedMoEError


def main(arguments: Sequence[str]) -> int:
    """Runs `CONFIG [arguments of hfedmoe compare ...]` and returns the exit code."""
    if not arguments or arguments[0].startswith("-"):
        return hfedmoe(["compare", *arguments])
    config, *others = arguments
    try:
        experiment = load_experiment(config)
    except HFedMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    output = f"output={Path.home() / experiment.output}"
    return hfedmoe(["compare", config, "backend=ray", "runtime.address=auto", output, *others])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
