"""A run in a notebook: the terminal's lines and bar as HTML that is replaced in place, without widgets."""

import sys
import time
import warnings
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.terminal_theme import TerminalTheme

from hfedmoe_ray.tracking.console import ConsoleRenderer

REFRESH_S = 0.2
"""Least time between two pictures of the bar."""
_WIDTH = 110
_STYLE = "line-height:1.35;font-family:Menlo,Consolas,'DejaVu Sans Mono',monospace;font-size:0.9em"
# Colours of middling brightness, legible on white and on black; text without a colour is the notebook's own.
_COLOURS = [
    (90, 90, 90),
    (205, 60, 50),
    (30, 140, 75),
    (185, 120, 0),
    (55, 115, 225),
    (165, 85, 190),
    (0, 140, 160),
    (128, 128, 128),
]
_THEME = TerminalTheme((255, 255, 255), (0, 0, 0), _COLOURS, [(150, 150, 150), (230, 80, 70), *_COLOURS[2:]])


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, which shows HTML."""
    return "IPython" in sys.modules and Console().is_jupyter


class NotebookRenderer(ConsoleRenderer):
    """Draws a run below the cell that started it (see `ConsoleRenderer`)."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(run_dir, _recorder())
        # Imported here: whoever is in a notebook has it, and nobody else needs it.
        from IPython.display import display

        # Libraries imported by a run ask for widgets, for bars of their own that nobody would see.
        warnings.filterwarnings("ignore", message="IProgress not found")
        self._running = False
        self._drawn = time.monotonic()
        self._handle = display(self._picture(), display_id=True)

    def __call__(self, name: str, fields: Any) -> None:
        """See `ConsoleRenderer.__call__`."""
        super().__call__(name, fields)
        self._draw(at_once=name in ("preparing", "start", "round", "finish", "waiting", "warning"))

    def close(self) -> None:
        """Takes the bar away; the lines stay."""
        self._running = False
        self._draw(at_once=True)

    def _show(self) -> None:
        self._running = True

    def _draw(self, *, at_once: bool) -> None:
        now = time.monotonic()
        if at_once or now - self._drawn >= REFRESH_S:
            self._drawn = now
            self._handle.update(self._picture())

    def _picture(self) -> "_Picture":
        bar = _recorder()
        if self._running:
            bar.print(self._bar())
        return _Picture([self._console, bar])


class _Picture:
    """What was printed on some consoles, as a notebook shows it, and as text where it shows no HTML."""

    def __init__(self, consoles: Sequence[Console]) -> None:
        self._text = "".join(one.export_text(clear=False) for one in consoles)
        self._html = "".join(
            one.export_html(clear=False, inline_styles=True, code_format="{code}", theme=_THEME) for one in consoles
        )

    def __repr__(self) -> str:
        return self._text

    def _repr_html_(self) -> str:
        return f'<pre style="{_STYLE}">{self._html}</pre>'


def _recorder() -> Console:
    """A console that shows nothing and keeps everything."""
    return Console(file=StringIO(), record=True, width=_WIDTH, highlight=False, force_jupyter=False)
