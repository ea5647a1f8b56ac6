"""Parse JSON and JSON Lines into records, with the line and character of any fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from course_utils.data_errors import DataError, Record, describe

_JSON_CURES = {
    "Expecting property name enclosed in double quotes": (
        "Write names and texts in double quotes, and no comma after the last field."
    ),
    "Illegal trailing comma before end of object": "Delete the last comma.",
    "Illegal trailing comma before end of array": "Delete the last comma.",
    "Invalid control character at": "Write a line break inside a text as \\n.",
    "Invalid \\escape": "Write a backslash as two: \\\\.",
    "Unterminated string starting at": "Close the text with a double quote.",
    "Expecting value": "Write texts in double quotes, and null, true, false so.",
    "Expecting ',' delimiter": 'Put a comma there; write a quote in a text as \\".',
    "Expecting ':' delimiter": "Put a colon between the field's name and its value.",
    "Extra data": "Put each record on a line of its own.",
}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(
            f'the field "{twice}" twice in one object',
            expected="each field once",
            cure="Delete or rename one of the two.",
            column=twice,
        )
    return fields


def _refuse_constant(name: str) -> None:
    raise DataError(
        f"{name}, which is not JSON",
        expected="a number, a text or null",
        cure="Write null, or leave the field out.",
    )


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
)


def _decode(path: Path, text: str, start: int, line: int, *, whole_line: bool):
    """One JSON value of `text` from `start`: (value, end). `line` is start's line."""
    try:
        if whole_line:
            return _DECODER.decode(text), len(text)
        return _DECODER.raw_decode(text, start)
    except DataError as error:
        raise error.at(path, line) from None
    except json.JSONDecodeError as error:
        cure = _JSON_CURES.get(error.msg.rstrip("."), "Correct the JSON there.")
        if whole_line and text.strip() in ("{", "["):
            cure = "Put each record on one line, or rename the file to end in .json."
        raise DataError(
            f"broken JSON ({error.msg})",
            expected="valid JSON",
            cure=cure,
            file=path,
            line=line if whole_line else error.lineno,
            column=error.colno,
        ) from None
    except (RecursionError, ValueError) as error:
        raise DataError(
            f"JSON that cannot be held ({error})",
            expected="records with few levels and ordinary numbers",
            cure="Simplify the record.",
            file=path,
            line=line,
        ) from None


def _as_record(path: Path, line: int, value: Any, unit: str = "line") -> Record:
    if not isinstance(value, dict):
        whole = isinstance(value, list) and line == 1 and path.suffix == ".jsonl"
        raise DataError(
            f"{describe(value)} as a record",
            expected='an object such as {"prompt": "...", "completion": "..."}',
            cure="If the file is one JSON list, rename it to end in .json."
            if whole
            else "Write each record as an object with named fields.",
            file=path,
            line=line,
            unit=unit,
        )
    return Record(str(path), line, unit, value)


def parse_json_lines(path: Path, text: str) -> list[Record]:
    """One record a line; blank lines are not records. `path` names the errors."""
    records = []
    for line, row in enumerate(text.split("\n"), start=1):
        if row.strip():
            value, _ = _decode(path, row, 0, line, whole_line=True)
            records.append(_as_record(path, line, value))
    return records


def parse_json(path: Path, text: str) -> list[Record]:
    """The records of one JSON list. `path` names the errors."""
    position, line, records = 0, 1, []

    def to(new: int) -> str:
        """Go to the first non-blank character from `new` on, and return it."""
        nonlocal position, line
        while new < len(text) and text[new] in " \t\r\n":
            new += 1
        line += text.count("\n", position, new)
        position = new
        return text[position : position + 1]

    def broken(message: str, cure: str) -> DataError:
        return DataError(
            f"broken JSON ({message})",
            expected="valid JSON",
            cure=cure,
            file=path,
            line=line,
            column=position - text.rfind("\n", 0, position),
        )

    if to(0) != "[":
        value, end = _decode(path, text, position, line, whole_line=False)
        first = line
        raise DataError(
            "several JSON values" if to(end) else f"{describe(value)}, not a list",
            expected="one JSON list of records",
            cure="With one record a line, rename the file to end in .jsonl."
            if position < len(text)
            else "Put the records between [ and ], with commas between them.",
            file=path,
            line=line if position < len(text) else first,
        )
    mark = to(position + 1)
    while mark != "]":
        value, end = _decode(path, text, position, line, whole_line=False)
        records.append(_as_record(path, line, value))
        mark = to(end)
        if mark not in (",", "]"):
            raise broken("Expecting ',' or ']' after a record", "Add the missing one.")
        if mark == ",":
            mark = to(position + 1)
            if mark == "]":
                raise broken("A comma after the last record", "Delete that comma.")
    if to(position + 1):
        raise broken("Extra data after the list", "Delete what follows the last ].")
    return records
