"""Put on a node's PYTHONPATH: every Python process there notes which .jsonl files it opens, in $WATCHED_LOG."""

import os
import sys
from pathlib import Path

if _log := os.environ.get("WATCHED_LOG"):

    def _note(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(".jsonl"):
            line = f"{os.getpid()} {Path.cwd() / str(arguments[0])}\n".encode()
            # Not by the builtin `open`, which would tell this hook of itself.
            descriptor = os.open(_log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(descriptor, line)
            os.close(descriptor)

    sys.addaudithook(_note)
