"""Read a .jsonl, .json, .csv or .parquet file into records that know their line.

`course_utils.data_schemas` gives the records their meaning; this module only reads,
and says exactly where and why a file cannot be read.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from course_utils.runtime import data_folder

# --- data_errors ---
# The error that says where a data set is broken; the record that knows its place.


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


# --- data_json ---
# Parse JSON and JSON Lines into records, with the line and character of any fault.

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


# A bundled training set for the task of another one, whose other splits it shares.
_SHARED = {
    name: ("home_commands", ("validation", "test"))
    for name in ("home_commands_large", "home_commands_wide")
}

_SIGNATURES = {
    b"PAR1": ("a Parquet file", "Rename it to end in .parquet."),
    b"PK\x03\x04": ("a zip archive or an Excel file", "Save it as CSV (UTF-8)."),
    b"\x1f\x8b": ("a gzip archive", "Decompress it first (gunzip)."),
    b"\xff\xfe": ("UTF-16 text", "Save it again with the encoding UTF-8."),
    b"\xfe\xff": ("UTF-16 text", "Save it again with the encoding UTF-8."),
}


def files_of_set(folder: Path) -> list[Path]:
    """The files in a data set's folder, and those it shares with another set."""
    files = sorted(folder.iterdir())
    if folder.name in _SHARED and folder.parent == data_folder():
        owner, splits = _SHARED[folder.name]
        files += [data_folder() / owner / f"{split}.jsonl" for split in splits]
    return files


def read_records(path: Path) -> list[Record]:
    """Every record of a file, in order.

    Blank lines of a .jsonl or .csv file are not records; all else is kept.

    Raises:
        DataError: The file cannot be read in full.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(
            f"the file type {suffix!r}" if suffix else "a file name without a type",
            expected="one of " + ", ".join(SUFFIXES),
            cure="Save the data as .jsonl: one JSON object a line, in UTF-8.",
            file=path,
        )
    if suffix == ".parquet":
        records = _read_parquet(path)
    else:
        records = _PARSERS[suffix](path, _read_text(path))
    if not records:
        raise DataError(
            "a file without a record",
            expected="at least one record",
            cure="Add records, or name another file.",
            file=path,
        )
    return records


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    if not raw.strip():
        raise DataError(
            "an empty file" if not raw else "a file of blanks",
            expected="at least one record",
            cure="Check that the file was saved and that this is the right one.",
            file=path,
        )
    for signature, (found, cure) in _SIGNATURES.items():
        if raw.startswith(signature):
            raise DataError(found, expected="UTF-8 text", cure=cure, file=path)
    raw = raw.removeprefix(b"\xef\xbb\xbf")  # the byte-order mark of Windows editors
    nul = raw.find(b"\0")
    if nul >= 0:
        raise DataError(
            "a NUL byte (0x00)",
            expected="UTF-8 text",
            cure="The file is binary, damaged or UTF-16: save it again as UTF-8.",
            file=path,
            **_place(raw, nul),
        )
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"the byte 0x{raw[error.start]:02X}, which is not UTF-8",
            expected="UTF-8 text",
            cure="Save it again as UTF-8 (it may be Latin-1, GBK or Windows-1252).",
            file=path,
            **_place(raw, error.start),
        ) from None


def _place(raw: bytes, position: int) -> dict[str, int]:
    start = raw.rfind(b"\n", 0, position) + 1
    before = raw[start:position].decode("utf-8", errors="replace")
    return {"line": raw.count(b"\n", 0, position) + 1, "column": len(before) + 1}


def _parse_csv(path: Path, text: str) -> list[Record]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    records: list[Record] = []
    line = 1
    most = csv.field_size_limit(len(text) + 1)  # one text may be a whole chapter
    try:
        for row in reader:
            if row and not header:
                header = row
                _check_header(path, header, line)
            elif row:
                records.append(Record(str(path), line, "line", {}))
                if len(row) != len(header):
                    raise DataError(
                        f"{len(row)} fields",
                        expected=f"{len(header)}, as in the header",
                        cure="Put a text with a comma or a quote in it in double "
                        "quotes, and write a quote inside as two.",
                        file=path,
                        line=line,
                    )
                records[-1].fields.update(zip(header, row, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"broken CSV ({error})",
            expected='quoted fields such as "He said ""yes"", twice"',
            cure="Close the quote that opens in this record, or use .jsonl.",
            file=path,
            line=line,
        ) from None
    finally:
        csv.field_size_limit(most)
    return records


def _check_header(path: Path, header: list[str], line: int) -> None:
    for name in header:
        if not name.strip() or header.count(name) > 1:
            raise DataError(
                f'the column "{name}" twice in the header'
                if name.strip()
                else "a column without a name in the header",
                expected="each column named once",
                cure="Rename or delete one of the columns.",
                file=path,
                line=line,
                column=name if name.strip() else header.index(name) + 1,
            )
    for mark, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if len(header) == 1 and mark in header[0]:
            raise DataError(
                f"columns separated by {name}",
                expected="columns separated by commas",
                cure="Save the table again as CSV with commas.",
                file=path,
                line=line,
            )


def _read_parquet(path: Path) -> list[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.ParquetFile(path).read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"no readable Parquet ({str(error).splitlines()[0][:80]})",
            expected="a Parquet table",
            cure="Write the file again, or check its name.",
            file=path,
        ) from None
    return [Record(str(path), line, "row", row) for line, row in enumerate(rows, 1)]


_PARSERS = {".jsonl": parse_json_lines, ".json": parse_json, ".csv": _parse_csv}
SUFFIXES = (*_PARSERS, ".parquet")
