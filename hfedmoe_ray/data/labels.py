"""Labels as files hold them (names, numbers, true/false) to class numbers 0..C-1 and back to names."""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from hfedmoe_ray.errors import DataError

IntArray = npt.NDArray[np.int64]


def label_names(values: Sequence[object], where: str) -> tuple[str, ...]:
    """Returns the distinct labels of a column: in numeric order if all are whole numbers, else alphabetically.

    Raises:
        DataError: a row has no label or one that is no class, or all rows have the same.
    """
    names = set(_names(values, where))
    ordered = sorted(names, key=int) if all(map(_is_number, names)) else sorted(names)
    if len(ordered) < 2:
        raise DataError(
            f"{where}: every row has the label {ordered[0]!r}, so there is nothing to tell apart. Point data.label at "
            "a column with at least two labels, or list all of them in data.labels."
        )
    return tuple(ordered)


def encode_labels(values: Sequence[object], names: Sequence[str], where: str, *, private: bool = False) -> IntArray:
    """Returns each row's class number: its label's place in `names`.

    A label that is a number means a place in `names`, unless the names are numbers themselves (as in "1", "2", "3").

    Args:
        values: The column.
        names: The classes.
        where: What an error calls the dataset.
        private: Whether an error keeps the value that it is about to itself.

    Raises:
        DataError: `names` repeats one, a row has no label, or one that `names` lacks.
    """
    numbers = {name: number for number, name in enumerate(names)}
    if len(numbers) < len(names) or len(names) < 2:
        raise DataError(f"data.labels lists {', '.join(names)}. List at least two labels, each of them once.")
    if not any(map(_is_number, names)):
        numbers |= {str(number): number for number in range(len(names))}
    codes = np.empty(len(values), dtype=np.int64)
    for row, name in enumerate(_names(values, where, private=private)):
        if name not in numbers:
            shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            found = shown_value(name, private=private)
            raise DataError(
                f"{where}, row {row + 1}: the label {found} is not among the {len(names)} known ones ({shown}). "
                "Correct the row, or list all labels in data.labels."
            )
        codes[row] = numbers[name]
    return codes


def shown_value(value: object, *, private: bool) -> str:
    """A value as an error quotes it; of a private one only what kind it is, as errors of clients go to the server."""
    return f"(a private {type(value).__name__})" if private else repr(value)


def _names(values: Sequence[object], where: str, *, private: bool = False) -> Iterable[str]:
    for row, value in enumerate(values, start=1):
        if isinstance(value, bool):
            yield str(value).lower()
        elif isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
            yield str(int(value))
        elif isinstance(value, str) and value.strip():
            yield value.strip()
        else:
            found = shown_value(value, private=private)
            raise DataError(
                f"{where}, row {row}: {found} is not a label. Every row needs a class name or a whole number; "
                "point data.label at the right column, or remove the row."
            )


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal()
