"""What one client does wrong, once, in whichever framework it trains."""

import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

CLIENT, ROUND = 0, 2
"""Who, and when."""
What = Literal["kill", "hang", "half", "truncated"]
"""Its process is killed; it never answers; its update lacks half of the experts; its update is cut off."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault that has not happened as long as its file is there."""

    what: What
    file: Path

    def due(self, client: int, round: int) -> bool:
        """Whether it happens now; then never again."""
        if (client, round) != (CLIENT, ROUND) or not self.file.exists():
            return False
        self.file.unlink()
        return True

    def strike(self) -> None:
        """What happens to the process."""
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "hang":
            threading.Event().wait()
