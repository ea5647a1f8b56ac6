"""Recorded runs: what took too long for a lesson, kept so that it can be recomputed.

A record is one JSON file, `data/runs/<NN>_<what>.json`, for one family of experiments:

    {"schema": 1, "name", "command", "created", "hardware", "versions",
     "data": {"name", "sha256", "also"?}, "seconds",
     "runs": [{"label", "settings", "seed", "loss", "eval_loss", "predictions",
               "references", "slices", "metrics", "measured", "seconds", ...}],
     "summary": {...}}

A run made elsewhere has a `machine` of its own, with `hardware` and `versions`.
`metrics` and `summary` hold only what can be computed again from the rest of the file,
and a test does so. What was measured (bytes, seconds of a part) stands in `measured`.
Shares are 0 to 1, unless the name ends in `_percent`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course_utils.runtime import data_folder


class RecordError(ValueError):
    """A record is missing, malformed, or says what its data do not."""


def runs_folder() -> Path:
    """The folder of the recorded runs."""
    return data_folder() / "runs"


def list_records() -> list[str]:
    """Names of all records, in order."""
    return sorted(path.stem for path in runs_folder().glob("*.json"))


def load_record(name: str) -> dict[str, Any]:
    """Read the record of that name, the file's without `.json`.

    Raises RecordError: there is no such record, or it is malformed.
    """
    path = runs_folder() / f"{name}.json"
    if name not in list_records():
        known = ", ".join(list_records()) or "none"
        lesson = f" LESSON={name[:2]}" if name[:2].isdigit() else ""
        raise RecordError(
            f"no record {name!r}; recorded: {known}. Where it is missing, "
            f"`git checkout data/runs` brings it back, and `make runs{lesson}` makes it"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{path.name} is not JSON: {error}") from None
    if not isinstance(record, dict) or not {"name", "runs", "summary"} <= set(record):
        raise RecordError(f"{path.name} is no record: it needs a name, runs, a summary")
    if record["name"] != name:
        raise RecordError(f"{path.name} holds the record {record['name']!r}")
    return record


@dataclass(frozen=True)
class Table:
    """Texts in columns, the first one flush left; a notebook shows a Markdown table."""

    head: tuple[str, ...]  # the columns' names
    rows: tuple[tuple[str, ...], ...]  # each as long as `head`
    caption: str = ""  # a line above it

    def __str__(self) -> str:
        lines = [self.head, *self.rows]
        left, *widths = (max(map(len, column)) for column in zip(*lines, strict=True))
        texts = []
        for name, *values in lines:
            cells = [v.rjust(width) for v, width in zip(values, widths, strict=True)]
            texts.append("  ".join([name.ljust(left), *cells]).rstrip())
        return "\n".join([self.caption, *texts] if self.caption else texts)

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        head, *rows = (f"| {' | '.join(line)} |" for line in [self.head, *self.rows])
        rule = "|---|" + "---:|" * (len(self.head) - 1)
        above = [self.caption, ""] if self.caption else []
        return "\n".join([*above, head, rule, *rows])
