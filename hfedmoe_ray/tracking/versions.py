"""Which software a run was made with: package versions and the commit of this code."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import hfedmoe_ray

PACKAGES = ("torch", "ray", "transformers", "deepspeed", "wandb")
_GIT_TIMEOUT_S = 5.0


def software_versions() -> dict[str, str]:
    """Returns name -> version of Python, this package and what it stands on; `git` only when run from a checkout.

    Packages are asked through their metadata, because importing them would cost seconds.
    """
    versions = {"hfedmoe_ray": hfedmoe_ray.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if commit := git_commit(Path(hfedmoe_ray.__file__)):
        versions["git"] = commit
    return versions


def git_commit(source: Path) -> str | None:
    """Returns the commit that `source` is tracked in, with "-dirty" for uncommitted changes; None outside a checkout.

    Being tracked is asked for, not merely lying inside a repository: a package installed into somebody's virtual
    environment would otherwise report the commit of their project.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S)
        return finished.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)
        commit = git("rev-parse", "HEAD")
        return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no", ".") else commit
    except (OSError, subprocess.SubprocessError):
        return None
