"""Read a .jsonl, .json, .csv or .parquet file into records that know their line.

`course_utils.data_schemas` gives the records their meaning; this module only reads,
and says exactly where and why a file cannot be read.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from course_utils.data_errors import DataError, Record
from course_utils.data_json import parse_json, parse_json_lines
from course_utils.runtime import data_folder

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
