"""The error that says where a data set is broken; the record that knows its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple


class DataError(ValueError):
    """A data set that cannot be used: where, what was found, and what to do.

    Attributes:
        file: The file (or data set) as the caller named it, or None.
        line: Line of a text file, row of a table; both count from 1. Or None.
        column: The field (a name), or the character in the line (a number).
        found: What stands there.
        expected: What should stand there.
        cure: What the reader can do about it.
    """

    def __init__(
        self,
        found: str,
        *,
        expected: str,
        cure: str,
        file: str | Path | None = None,
        line: int | None = None,
        column: str | int | None = None,
        unit: str = "line",
    ) -> None:
        self.found, self.expected, self.cure = found, expected, cure
        self.file = None if file is None else str(file)
        self.line, self.column, self.unit = line, column, unit
        where = [] if file is None else [str(file)]
        if line is not None:
            where.append(f"{unit} {line}")
        if isinstance(column, int):
            where.append(f"character {column}")
        elif column is not None:
            where.append(f'column "{column}"')
        prefix = ", ".join(where) + ": " if where else ""
        super().__init__(f"{prefix}found {found}; expected {expected}. {cure}")

    def at(self, file: str | Path, line: int, unit: str = "line") -> DataError:
        """The same error with its place filled in."""
        return DataError(
            self.found,
            expected=self.expected,
            cure=self.cure,
            file=file,
            line=line,
            column=self.column,
            unit=unit,
        )


class Record(NamedTuple):
    """One record and where it stands."""

    file: str
    line: int
    unit: str
    fields: dict[str, Any]

    def error(
        self, column: str | None, found: str, expected: str, cure: str
    ) -> DataError:
        """A `DataError` at this record."""
        return DataError(
            found,
            expected=expected,
            cure=cure,
            file=self.file,
            line=self.line,
            column=column,
            unit=self.unit,
        )


def describe(value: object) -> str:
    """A value in words short enough for an error message.

    >>> describe(3), describe(None), describe("")
    ('the number 3', 'nothing (null)', 'an empty text')
    """
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        if not value.strip():
            return "a text of blanks" if value else "an empty text"
        return "the text " + json.dumps(value[:40], ensure_ascii=False)
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    return f"a value of type {type(value).__name__}"


def mixed_column(name: str, values: list[Any], records: list[Record]) -> DataError:
    """The first record whose value does not go with those before it."""
    import pyarrow

    first, end = 1, len(values)  # the least number of values that fail together
    while first < end:
        middle = (first + end) // 2
        try:
            pyarrow.array(values[:middle])
            first = middle + 1
        except (pyarrow.ArrowException, OverflowError, UnicodeError):
            end = middle
    return records[end - 1].error(
        name,
        f"{describe(values[end - 1])}, unlike the values before it",
        "values of one kind in a column",
        "Write all its values the same way, for example all as texts.",
    )
