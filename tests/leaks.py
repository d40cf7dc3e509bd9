"""Where secrets are looked for: files, whatever they hold, and the command lines of processes."""

import re
from collections.abc import Collection, Iterable
from pathlib import Path

import psutil


def files_with(secrets: Collection[str], *directories: Path) -> list[str]:
    """Files below directories that hold one of the secrets; those that vanish meanwhile hold none."""
    pattern = re.compile(b"|".join(re.escape(secret.encode()) for secret in secrets))
    found = []
    for path in (path for directory in directories for path in directory.rglob("*")):
        try:
            if path.is_file() and not path.is_symlink() and pattern.search(path.read_bytes()):
                found.append(str(path))
        except OSError:
            continue
    return found


def commands_with(secrets: Collection[str], processes: Iterable[psutil.Process]) -> list[str]:
    """Command lines that hold one of the secrets, of processes that are still there."""
    found = []
    for process in processes:
        try:
            words = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if any(secret in words for secret in secrets):
            found.append(words)
    return found
