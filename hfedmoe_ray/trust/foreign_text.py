"""Text that clients have a hand in - names of tensors, errors - on its way to terminals, logs and pages."""

MOST_SHOWN = 400
"""Characters that are kept."""


def one_line(text: str) -> str:
    """Returns text as something that can be printed: one line, short, and nothing in it that steers a terminal."""
    printable = "".join(letter if letter.isprintable() else " " for letter in text[: 2 * MOST_SHOWN])
    shown = " ".join(printable.split())
    return shown if len(shown) <= MOST_SHOWN else f"{shown[:MOST_SHOWN]}…"
