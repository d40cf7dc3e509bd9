"""Publishing an exported model on a model hub."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hfedmoe_ray.errors import ConfigError, ModelError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_can_push(repository: str) -> None:
    """Looks, without a network, whether a folder could be pushed: before an hour of exporting, not after it.

    Raises:
        ConfigError: There is no token, or the repository's name is none.
    """
    from huggingface_hub import get_token

    if not _NAME.fullmatch(repository):
        raise ConfigError(f"--push: {repository!r} names no repository. Write OWNER/NAME, to be made or added to.")
    if get_token() is None:
        raise ConfigError(
            "--push needs a token that may write to the hub, and there is none. Set HF_TOKEN, or log in once with "
            "`hf auth login`. HF_ENDPOINT names a hub of your own. Without --push the folder is written here only."
        )


def push(directory: Path, repository: str, *, public: bool = False) -> str:
    """Uploads a folder to a repository of the hub, which is made if there is none; returns the commit's address.

    Args:
        directory: What `export_run` wrote.
        repository: OWNER/NAME. One that exists keeps its visibility, and files of other names.
        public: Whether everyone may read a repository that is made.

    Raises:
        ConfigError: There is no token, or the name is none.
        ModelError: The hub cannot be reached, or does not take it.
    """
    from huggingface_hub import HfApi

    check_can_push(repository)
    with _told(directory, repository):
        hub = HfApi()
        hub.create_repo(repository, private=not public, exist_ok=True)
        commit = hub.upload_folder(repo_id=repository, folder_path=directory, commit_message="Exported by hfedmoe_ray")
    return str(commit.commit_url)


@contextmanager
def _told(directory: Path, repository: str) -> Iterator[None]:
    """Turns whatever goes wrong with the hub into one paragraph."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    # Errors of whichever client library the installed huggingface_hub is built on.
    unreachable: tuple[type[BaseException], ...] = tuple(
        base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)
    )

    kept = f"Nothing is lost: {directory} is complete, and can be sent with `hf upload {repository} {directory}`."
    try:
        yield
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"--push: {constants.ENDPOINT} does not take {repository} from you ({reason}). Check the name, and that "
            f"your token may write there. {kept}"
        ) from error
    except unreachable as error:
        raise ModelError(
            f"--push: {constants.ENDPOINT} cannot be reached ({error}). Push where there is a network. {kept}"
        ) from error
