"""Passwords and tokens do not belong into a configuration.

A configuration is copied: into the run's directory, to trackers, into the upload of a job, and an override into the
list of processes. Environment variables are where every library that needs such a secret looks for it.
"""

import re
from collections.abc import Iterator
from typing import Any

from hfedmoe_ray.errors import ConfigError

_SECRETS = {
    "a password": re.compile(r"://[^/\s:@]*:[^/\s@]+@"),
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}"),
    "a W&B key": re.compile(r"\bwandb_v1_\w{30,}"),
}
_INSTEAD = {
    "tracking": "put the address with it into $MLFLOW_TRACKING_URI (or the user and password alone into "
    "$MLFLOW_TRACKING_USERNAME and $MLFLOW_TRACKING_PASSWORD), or the key into $WANDB_API_KEY",
    "": "put a token into $HF_TOKEN, or fetch what it gives access to first and name the file",
}
"""By section."""


def check_credentials(values: Any) -> None:
    """Refuses a configuration in which a password or token stands.

    Args:
        values: As read: mappings, lists and what is in them.

    Raises:
        ConfigError: With the key, and without the secret.
    """
    for path, text in _texts(values, ()):
        for what, pattern in _SECRETS.items():
            if pattern.search(text):
                raise ConfigError(
                    f"{'.'.join(path)} holds {what}. A configuration is copied into run directories, trackers and job "
                    f"uploads, and overrides can be seen in the list of processes: leave it out and "
                    f"{_INSTEAD.get(path[0], _INSTEAD[''])}. What has been written down already should be replaced by "
                    "a new one."
                )


def _texts(values: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text with the path of its key."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _texts(value, (*path, str(key)))
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            yield from _texts(value, (*path, str(index)))
    elif isinstance(values, str):
        yield path, values
