"""Text that clients have a hand in - names of tensors, errors - on its way to terminals, logs and pages."""

MOST_SHOWN = 400
"""Characters that are kept."""


def one_line(text: str) -> str:
    """Returns text as something that can be printed: one line, short, and nothing in it that steers a terminal."""
    shown = " ".join(printable(text[: 2 * MOST_SHOWN]).split())
    return shown if len(shown) <= MOST_SHOWN else f"{shown[:MOST_SHOWN]}…"


def printable(text: str) -> str:
    """Returns text, such as a traceback, with its lines and without what steers a terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text)
