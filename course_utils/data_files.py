"""Read a .jsonl, .json, .csv or .parquet file into records that know their place.

`course_utils.data` gives the records their meaning.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple


class DataError(ValueError):
    """A data set that cannot be used: where, what was found, and what to do.

    `line` counts what `unit` names, `column` is a field's name or the number of a
    character in the line; numbers count from 1.
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
        self.line, self.column = line, column
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

    def error(self, column: str | None, *fault: str) -> DataError:
        """A `DataError` (found, expected, cure) at this record."""
        place = {"file": self.file, "line": self.line, "unit": self.unit}
        return DataError(*fault, column=column, **place)


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
        text = json.dumps(value[:40], ensure_ascii=False)
        return "the text " + text.encode(errors="backslashreplace").decode()
    if isinstance(value, dict):
        return "an object with " + ", ".join(map(repr, value)) if value else "an object"
    if isinstance(value, list | tuple):
        return "a list"
    return f"a value of type {type(value).__name__}"


def read_records(path: Path) -> list[Record]:
    """Every record of a file, in order; `DataError` where one cannot be read.

    Blank lines of a .jsonl or .csv file are no records.
    """
    suffix = path.suffix.lower()
    if suffix not in READERS:
        fault = f"the file type {suffix!r}" if suffix else "a file name without a type"
        cure = "Save the data as .jsonl: one JSON object a line, in UTF-8."
        raise DataError(fault, "one of " + ", ".join(READERS), cure, file=path)
    if not (records := READERS[suffix](path)):
        cure = "Add records, or name another file."
        raise DataError("a file without a record", "at least one", cure, file=path)
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
    if b"\0" in raw:
        position, fault = raw.index(b"\0"), "a NUL byte (0x00)"
        cure = "The file is binary, damaged or UTF-16: save it again as UTF-8."
    else:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            position = error.start
        fault = f"the byte 0x{raw[position]:02X}, which is not UTF-8"
        cure = "Save it again as UTF-8 (it may be Latin-1, GBK or Windows-1252)."
    line, start = raw.count(b"\n", 0, position) + 1, raw.rfind(b"\n", 0, position) + 1
    column = len(raw[start:position].decode("utf-8", errors="replace")) + 1
    raise DataError(fault, "UTF-8 text", cure, file=path, line=line, column=column)


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
    "Expecting value": (
        "Write texts in double quotes, null, true, false so, and no comma at the end."
    ),
    "Expecting ',' delimiter": 'Put a comma there; write a quote in a text as \\".',
    "Expecting ':' delimiter": "Put a colon between the field's name and its value.",
    "Extra data": "Put each record on a line of its own.",
}
_BETWEEN = re.compile(r"[ \t\r\n,]*")  # what stands between the records of a list


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        fault = f'the field "{twice}" twice in one object', "each field once"
        raise DataError(*fault, "Delete or rename one of the two.", column=twice)
    return fields


def _no_nan(name: str) -> None:
    cure = "Write null, or leave the field out."
    raise DataError(f"{name}, which is not JSON", "a number, a text or null", cure)


STRICT_JSON = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_no_nan)


def _decode(
    path: Path, text: str, line: int, decode: Callable[[str], Any] = STRICT_JSON.decode
) -> Any:
    """What `decode` makes of a text that begins on `line` of the file."""
    place = {"file": path, "line": line}
    try:
        return decode(text)
    except DataError as error:  # which knows no place
        fault = error.found, error.expected, error.cure
        place["column"] = error.column
    except json.JSONDecodeError as error:
        cure = _JSON_CURES.get(error.msg.rstrip("."), "Correct the JSON there.")
        if path.suffix.lower() == ".json" and error.msg == "Extra data":
            cure = "With one record a line, rename the file to end in .jsonl."
            if text.lstrip().startswith("["):
                cure = "Delete what follows the last ]."
        elif text.strip() in ("{", "["):
            cure = "Put each record on one line, or rename the file to end in .json."
        fault = f"broken JSON ({error.msg})", "valid JSON", cure
        place |= {"line": line + error.lineno - 1, "column": error.colno}
    except (RecursionError, ValueError) as error:
        expected = "records with few levels and ordinary numbers"
        fault = f"JSON that cannot be held ({error})", expected, "Simplify the record."
    raise DataError(*fault, **place)


def _as_record(path: Path, line: int, value: Any) -> Record:
    if isinstance(value, dict):
        return Record(str(path), line, "line", value)
    fault, expected = f"{describe(value)} as a record", "an object with named fields"
    cure = 'Write records as {"prompt": "...", "completion": "..."}.'
    if isinstance(value, list) and line == 1 and path.suffix == ".jsonl":
        cure = "If the file is one JSON list, rename it to end in .json."
    raise DataError(fault, expected, cure, file=path, line=line)


def _read_json_lines(path: Path) -> list[Record]:
    return [
        _as_record(path, line, _decode(path, row, line))
        for line, row in enumerate(_read_text(path).split("\n"), start=1)
        if row.strip()
    ]


def _read_json(path: Path) -> list[Record]:
    """The records of one JSON list, each with the line that it begins on."""
    text = _read_text(path)
    values = _decode(path, text, 1, json.loads)
    if not isinstance(values, list):
        fault = f"{describe(values)}, not a list"
        cure = "Put the records between [ and ], with commas between them."
        raise DataError(fault, "one JSON list of records", cure, file=path, line=1)
    records, line, end = [], 1, text.index("[") + 1
    counted = 0  # the line is that of this position
    for _ in values:  # again one by one, since `json` gives no place of a value
        start = _BETWEEN.match(text, end).end()
        line, counted = line + text.count("\n", counted, start), start
        decode = partial(STRICT_JSON.raw_decode, idx=start)
        value, end = _decode(path, text, line, decode)
        records.append(_as_record(path, line, value))
    return records


# --- tables ---


def _read_csv(path: Path) -> list[Record]:
    text = _read_text(path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header, records, line = [], [], 1
    usual_limit = csv.field_size_limit(len(text) + 1)  # a text may be a whole chapter
    try:
        for row in reader:
            if row and not header:
                _check_header(path, row, line)
                header = row
            elif row and len(row) != len(header):
                fault = f"{len(row)} fields", f"{len(header)}, as in the header"
                cure = "Put a text with a comma or a quote in it in double quotes."
                raise DataError(*fault, cure, file=path, line=line)
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
        if name.strip() and header.count(name) == 1:
            continue
        fault, column = f'the column "{name}" twice in the header', name
        if not name.strip():
            fault, column = "a column without a name in the header", number
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
        rows = pyarrow.parquet.ParquetFile(path).read()
        rows = rows.to_pylist(maps_as_pydicts="strict")  # not lists of pairs
    except (pyarrow.ArrowException, OSError, KeyError) as error:
        fault = f"no readable Parquet ({str(error).splitlines()[0][:80]})"
        cure = "Write the file again, or check its name."
        raise DataError(fault, "a Parquet table", cure, file=path) from None
    return [Record(str(path), line, "row", row) for line, row in enumerate(rows, 1)]


READERS = {".jsonl": _read_json_lines, ".json": _read_json}
READERS |= {".csv": _read_csv, ".parquet": _read_parquet}
