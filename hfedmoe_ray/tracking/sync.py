"""Sending to Weights & Biases what runs have logged offline, with the library's own `wandb sync`."""

import subprocess
import sys
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from hfedmoe_ray.errors import CheckpointError, ConfigError, TrackingError
from hfedmoe_ray.tracking.wandb import has_credentials, server_url

REACH_TIMEOUT_S = 10.0
"""How long the server may take to answer at all; `wandb sync` would try for as long as it is let."""


def offline_logs(run_dir: Path) -> tuple[Path, ...]:
    """What a run has logged offline and not sent yet: a file for each time it was started or resumed, in order.

    Raises:
        CheckpointError: it has logged nothing offline.
    """
    logs = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"))
    if not logs:
        raise CheckpointError(
            f"{run_dir} has nothing to send to Weights & Biases: there is no {run_dir}/wandb/offline-run-*. Either the "
            "run was online, tracking.wandb.mode was disabled, or this is not the directory of a run."
        )
    return tuple(log for log in logs if not _is_sent(log))


def sync(logs: Sequence[Path]) -> None:
    """Sends them, in order; what the library says is shown.

    Raises:
        ConfigError: there is no key for the server.
        TrackingError: the server cannot be reached, or does not take them.
    """
    if not has_credentials():
        raise ConfigError(
            f"There is no API key for Weights & Biases at {server_url()}: run `wandb login`, or set WANDB_API_KEY (and "
            "WANDB_BASE_URL for a server of your own), and give this command again. Nothing was sent."
        )
    try:
        urlopen(server_url(), timeout=REACH_TIMEOUT_S).close()
    except HTTPError:
        pass  # Whatever it answers, it is there.
    except (OSError, HTTPException, ValueError) as error:
        raise TrackingError(
            f"Weights & Biases at {server_url()} cannot be reached: {error}. Nothing was sent, and nothing is lost: "
            "give this command again where there is a network."
        ) from error
    command = [sys.executable, "-m", "wandb", "sync", *(str(log.parent.resolve()) for log in logs)]
    # Its own log goes beside the runs, not into a new directory here.
    done = subprocess.run(command, check=False, cwd=logs[0].parents[2])
    # It ends with 0 also where the server has refused a run; what it has sent it marks.
    unsent = [log for log in logs if not _is_sent(log)]
    if done.returncode or unsent:
        raise TrackingError(
            f"`wandb sync` has not sent {len(unsent)} of {len(logs)} logs to {server_url()}; what it said is above. "
            "Nothing is lost: give this command again when that is mended."
        )


def _is_sent(log: Path) -> bool:
    return log.with_suffix(".wandb.synced").exists()
