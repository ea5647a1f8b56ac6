"""Read a .jsonl, .json, .csv or .parquet file into records that know their place.

`course_utils.data` gives the records their meaning; this module only reads, and says
exactly where and why a file cannot be read.
"""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple


class DataError(ValueError):
    """A data set that cannot be used: where, what was found, and what to do.

    Attributes:
        found: What stands there.
        expected: What should stand there.
        cure: What the reader can do about it.
        file: The file (or data set) as the caller named it, or None.
        line: Line of a text file, row of a table; both count from 1. Or None.
        column: The field (a name), or the character in the line (a number).
    """

    def __init__(
        self,
        found: str,
        expected: str,
        cure: str,
        *,
        file: str | Path | None = None,
        line: int | None = None,
        column: str | int | None = None,
        unit: str = "line",
    ) -> None:
        self.found, self.expected, self.cure = found, expected, cure
        self.file = None if file is None else str(file)
        self.line, self.column, self.unit = line, column, unit
        place = [] if file is None else [str(file)]
        if line is not None:
            place.append(f"{unit} {line}")
        if isinstance(column, int):
            place.append(f"character {column}")
        elif column is not None:
            place.append(f'column "{column}"')
        prefix = ", ".join(place) + ": " if place else ""
        super().__init__(f"{prefix}found {found}; expected {expected}. {cure}")


class Record(NamedTuple):
    """One record and where it stands; `unit` says what `line` counts."""

    file: str
    line: int
    unit: str
    fields: dict[str, Any]

    def error(
        self, column: str | None, found: str, expected: str, cure: str
    ) -> DataError:
        """A `DataError` at this record."""
        place = {"file": self.file, "line": self.line, "unit": self.unit}
        return DataError(found, expected, cure, column=column, **place)


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


def read_records(path: Path) -> list[Record]:
    """Every record of a file, in order.

    Blank lines of a .jsonl or .csv file are not records; all else is kept.

    Raises:
        DataError: The file cannot be read in full.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        fault = f"the file type {suffix!r}" if suffix else "a file name without a type"
        cure = "Save the data as .jsonl: one JSON object a line, in UTF-8."
        raise DataError(fault, "one of " + ", ".join(SUFFIXES), cure, file=path)
    if suffix == ".parquet":
        records = _read_parquet(path)
    else:
        records = _PARSERS[suffix](path, _read_text(path))
    if not records:
        fault, cure = "a file without a record", "Add records, or name another file."
        raise DataError(fault, "at least one record", cure, file=path)
    return records


# --- text ---

_SIGNATURES = {
    b"PAR1": ("a Parquet file", "Rename it to end in .parquet."),
    b"PK\x03\x04": ("a zip archive or an Excel file", "Save it as CSV (UTF-8)."),
    b"\x1f\x8b": ("a gzip archive", "Decompress it first (gunzip)."),
    b"\xff\xfe": ("UTF-16 text", "Save it again with the encoding UTF-8."),
    b"\xfe\xff": ("UTF-16 text", "Save it again with the encoding UTF-8."),
}


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    if not raw.strip():
        fault = "a file of blanks" if raw else "an empty file"
        cure = "Check that the file was saved and that this is the right one."
        raise DataError(fault, "at least one record", cure, file=path)
    for signature, (content, cure) in _SIGNATURES.items():
        if raw.startswith(signature):
            raise DataError(content, "UTF-8 text", cure, file=path)
    raw = raw.removeprefix(b"\xef\xbb\xbf")  # the byte-order mark of Windows editors
    nul = raw.find(b"\0")
    if nul >= 0:
        cure = "The file is binary, damaged or UTF-16: save it again as UTF-8."
        place = _place(path, raw, nul)
        raise DataError("a NUL byte (0x00)", "UTF-8 text", cure, **place)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        fault = f"the byte 0x{raw[error.start]:02X}, which is not UTF-8"
        cure = "Save it again as UTF-8 (it may be Latin-1, GBK or Windows-1252)."
        place = _place(path, raw, error.start)
        raise DataError(fault, "UTF-8 text", cure, **place) from None


def _place(path: Path, raw: bytes, position: int) -> dict[str, Any]:
    start = raw.rfind(b"\n", 0, position) + 1
    before = raw[start:position].decode("utf-8", errors="replace")
    line = raw.count(b"\n", 0, position) + 1
    return {"file": path, "line": line, "column": len(before) + 1}


# --- JSON ---

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
_BLANKS = re.compile(r"[ \t\r\n]*")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        fault = f'the field "{twice}" twice in one object'
        cure = "Delete or rename one of the two."
        raise DataError(fault, "each field once", cure, column=twice)
    return fields


def _refuse_constant(name: str) -> None:
    cure = "Write null, or leave the field out."
    raise DataError(f"{name}, which is not JSON", "a number, a text or null", cure)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
)


def _decode(path: Path, text: str, line: int, start: int | None = None):
    """A JSON value and the position of its end; `line` is where it begins.

    Without `start`, `text` is one line of the file and holds the value alone.
    """
    try:
        if start is None:
            return _DECODER.decode(text), len(text)
        return _DECODER.raw_decode(text, start)
    except DataError as error:  # of the two functions above, which know no place
        fault = error.found, error.expected, error.cure
        place = {"line": line, "column": error.column}
    except json.JSONDecodeError as error:
        cure = _JSON_CURES.get(error.msg.rstrip("."), "Correct the JSON there.")
        if start is None and text.strip() in ("{", "["):
            cure = "Put each record on one line, or rename the file to end in .json."
        fault = f"broken JSON ({error.msg})", "valid JSON", cure
        place = {"line": line if start is None else error.lineno, "column": error.colno}
    except (RecursionError, ValueError) as error:
        expected = "records with few levels and ordinary numbers"
        fault = f"JSON that cannot be held ({error})", expected, "Simplify the record."
        place = {"line": line}
    raise DataError(*fault, file=path, **place)


def _as_record(path: Path, line: int, value: Any) -> Record:
    if isinstance(value, dict):
        return Record(str(path), line, "line", value)
    cure = "Write each record as an object with named fields."
    if isinstance(value, list) and line == 1 and path.suffix == ".jsonl":
        cure = "If the file is one JSON list, rename it to end in .json."
    expected = 'an object such as {"prompt": "...", "completion": "..."}'
    fault = f"{describe(value)} as a record"
    raise DataError(fault, expected, cure, file=path, line=line)


def _parse_json_lines(path: Path, text: str) -> list[Record]:
    return [
        _as_record(path, line, _decode(path, row, line)[0])
        for line, row in enumerate(text.split("\n"), start=1)
        if row.strip()
    ]


def _parse_json(path: Path, text: str) -> list[Record]:
    """The records of one JSON list, each with the line that it begins on.

    They are decoded one by one, because `json` gives no line for a value.
    """
    position, line = 0, 1

    def go_to(target: int) -> str:
        """Move to the first character from `target` on that is no blank."""
        nonlocal position, line
        target = _BLANKS.match(text, target).end()
        line += text.count("\n", position, target)
        position = target
        return text[position : position + 1]

    def broken(fault: str, cure: str) -> DataError:
        column = position - text.rfind("\n", 0, position)
        place = {"file": path, "line": line, "column": column}
        return DataError(f"broken JSON ({fault})", "valid JSON", cure, **place)

    if go_to(0) != "[":
        value, end = _decode(path, text, line, position)
        fault = f"{describe(value)}, not a list"
        cure = "Put the records between [ and ], with commas between them."
        place = {"file": path, "line": line}
        if go_to(end):
            fault, place["line"] = "several JSON values", line
            cure = "With one record a line, rename the file to end in .jsonl."
        raise DataError(fault, "one JSON list of records", cure, **place)
    records = []
    mark = go_to(position + 1)
    while mark != "]":
        value, end = _decode(path, text, line, position)
        records.append(_as_record(path, line, value))
        mark = go_to(end)
        if mark not in (",", "]"):
            raise broken("Expecting ',' or ']' after a record", "Add the missing one.")
        if mark == ",":
            mark = go_to(position + 1)
            if mark == "]":
                raise broken("A comma after the last record", "Delete that comma.")
    if go_to(position + 1):
        raise broken("Extra data after the list", "Delete what follows the last ].")
    return records


# --- tables ---


def _parse_csv(path: Path, text: str) -> list[Record]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    records: list[Record] = []
    line = 1
    usual_limit = csv.field_size_limit(len(text) + 1)  # a text may be a whole chapter
    try:
        for row in reader:
            if row and not header:
                header = row
                _check_header(path, header, line)
            elif row and len(row) != len(header):
                raise DataError(
                    f"{len(row)} fields",
                    f"{len(header)}, as in the header",
                    "Put a text with a comma or a quote in it in double quotes, and "
                    "write a quote inside as two.",
                    file=path,
                    line=line,
                )
            elif row:
                fields = dict(zip(header, row, strict=True))
                records.append(Record(str(path), line, "line", fields))
            line = reader.line_num + 1
    except csv.Error as error:
        fault = f"broken CSV ({error})"
        expected = 'quoted fields such as "He said ""yes"", twice"'
        cure = "Close the quote that opens in this record, or use .jsonl."
        raise DataError(fault, expected, cure, file=path, line=line) from None
    finally:
        csv.field_size_limit(usual_limit)
    return records


def _check_header(path: Path, header: list[str], line: int) -> None:
    place = {"file": path, "line": line}
    for number, name in enumerate(header, start=1):
        if not name.strip():
            fault, column = "a column without a name in the header", number
        elif header.count(name) > 1:
            fault, column = f'the column "{name}" twice in the header', name
        else:
            continue
        cure = "Rename or delete one of the columns."
        raise DataError(fault, "each column named once", cure, column=column, **place)
    for mark, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(header) == 1 and mark in header[0]:
            fault = f"columns separated by {name}"
            cure = "Save the table again as CSV with commas."
            raise DataError(fault, "columns separated by commas", cure, **place)


def _read_parquet(path: Path) -> list[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        fault = f"no readable Parquet ({str(error).splitlines()[0][:80]})"
        cure = "Write the file again, or check its name."
        raise DataError(fault, "a Parquet table", cure, file=path) from None
    return [Record(str(path), line, "row", row) for line, row in enumerate(rows, 1)]


_PARSERS = {".jsonl": _parse_json_lines, ".json": _parse_json, ".csv": _parse_csv}
SUFFIXES = (*_PARSERS, ".parquet")
