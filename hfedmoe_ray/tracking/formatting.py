"""How numbers are written for people, the same on the terminal and in the report."""

MISSING = "–"
"""What stands where a number is not known."""


def percent(share: float | None, digits: int = 1) -> str:
    """0.6432 -> "64.3 %"."""
    return MISSING if share is None else f"{100 * share:.{digits}f} %"


def points(before: float, after: float) -> str:
    """The difference of two shares in percentage points, with its sign: "+5.2 points"."""
    difference = 100 * (after - before)
    return f"{'−' if difference < 0 else '+'}{abs(difference):.1f} points"


def decimal(value: float | None, digits: int = 3) -> str:
    """1.23456 -> "1.235"."""
    return MISSING if value is None else f"{value:.{digits}f}"


def short(value: float) -> str:
    """A mean without false precision: "6", "6.5"."""
    return f"{value:.1f}".removesuffix(".0")


def size(count: float) -> str:
    """Bytes in the unit that fits: "512 B", "3.2 MiB", "1.4 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"


def against(predicted: float | None, seen: float) -> str:
    """Bytes that were predicted, and by how much they are more than those seen: "1.4 GiB (+10 %)"."""
    if predicted is None or not seen:
        return MISSING
    off = round(100 * (predicted / seen - 1))
    return f"{size(predicted)} ({'−' if off < 0 else '+'}{abs(off)} %)"


def duration(seconds: float) -> str:
    """Seconds as a person says them: "4.2 s", "3 min 05 s", "2 h 10 min"."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def roughly(seconds: float) -> str:
    """Seconds as one guesses them: "5 s", "40 s", "3 min", "2 h 10 min"."""
    if seconds < 57.5:
        return f"{max(5, 5 * round(seconds / 5))} s"
    hours, minutes = divmod(max(1, round(seconds / 60)), 60)
    if not hours:
        return f"{minutes} min"
    return f"{hours} h {5 * (minutes // 5):02d} min" if hours < 10 else f"{hours} h"


def plural(count: int, noun: str) -> str:
    """1 -> "1 client", 3 -> "3 clients"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
