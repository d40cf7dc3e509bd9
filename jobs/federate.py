"""A federated run as a Ray job: what `hfedmoe run` does, on the cluster the job runs in.

    ray job submit --runtime-env jobs/runtime_env.yaml -- python -u jobs/federate.py configs/quickstart.yaml rounds=4

`hfedmoe submit` does this too, and brings the run's record home. A job's working directory is deleted when the job
ends, so a relative `output` is taken from the home directory of the node instead.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from hfedmoe_ray.cli import main as hfedmoe
from hfedmoe_ray.config.load import load_experiment
from hfedmoe_ray.errors import HFedMoEError
from hfedmoe_ray.runtime.archive import pack


def main(arguments: Sequence[str]) -> int:
    """Runs `[--send-files] [options of hfedmoe run] CONFIG [key=value ...]` and returns the exit code.

    With `--send-files` the run's record is printed at the end, for `hfedmoe submit` to take out of the log.
    """
    options = [one for one in arguments if one.startswith("--") and one != "--send-files"]
    config, *overrides = [one for one in arguments if not one.startswith("--")]
    overrides = ["backend=ray", "runtime.address=auto", *overrides]
    try:
        experiment = load_experiment(config, overrides)
    except HFedMoEError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    output = Path.home() / experiment.output
    code = hfedmoe(["run", *options, config, *overrides, f"output={output}"])
    if code == 0 and "--send-files" in arguments:
        print("\n".join(pack(output / experiment.name)))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
