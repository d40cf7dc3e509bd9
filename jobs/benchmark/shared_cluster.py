"""A Ray cluster that belongs to no run.

shared_cluster.py CPUS DIRECTORY FILE

Its address is written into FILE; it lasts until its process is ended. Runs in the environment of either side.
"""

import signal
import sys
from pathlib import Path

import ray


def main(cpus: int, directory: str, file: Path) -> None:
    """Starts it and waits."""
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False, _temp_dir=directory)
    draft = file.with_suffix(".draft")
    draft.write_text(ray.get_runtime_context().gcs_address)
    draft.rename(file)
    signal.pause()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
