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

import datetime
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from course_utils.record_metrics import (
    METRICS,
    RecordError,
    default_summary,
    differences,
    finite,
    metric,
    recompute,
    summary_of,
)
from course_utils.runtime import data_folder, replace_file

__all__ = [
    "METRICS",
    "RecordError",
    "default_summary",
    "differences",
    "list_records",
    "load_record",
    "lookup",
    "metric",
    "recompute",
    "runs_folder",
    "save_record",
    "summary_of",
    "validate_record",
]

SCHEMA = 1
_TOP = {
    "schema": int,
    "name": str,
    "command": str,
    "created": str,
    "hardware": dict,
    "versions": dict,
    "data": dict,
    "seconds": (int, float),
    "runs": list,
    "summary": dict,
}
_RUN = {
    "label": (str, True),
    "settings": (dict, True),
    "seed": (int, True),
    "loss": (list, True),
    "metrics": (dict, True),
    "seconds": ((int, float), True),
    "eval_loss": (list, False),
    "predictions": (list, False),
    "references": (list, False),
    "slices": (list, False),
    "measured": (dict, False),
    "trainable_parameters": (int, False),
    "tokens_per_s": ((int, float), False),
    "machine": (dict, False),
}


def _expect(value: Any, kinds: Any, where: str) -> None:
    if not isinstance(value, kinds) or isinstance(value, bool):
        names = kinds if isinstance(kinds, tuple) else (kinds,)
        wanted = " or ".join(kind.__name__ for kind in names)
        raise RecordError(f"{where} is {type(value).__name__}, expected {wanted}")


def validate_record(record: Any) -> None:
    """Check that a record has the schema's shape; see the module's own text.

    Args:
        record: what was read, of any type.

    Raises:
        RecordError: says which field, what was found and what was expected.
    """
    _expect(record, dict, "the record")
    name = record.get("name", "a record")
    for key, kinds in _TOP.items():
        if key not in record:
            raise RecordError(f"{name}: field {key!r} is missing")
        _expect(record[key], kinds, f"{name}: {key}")
    if unknown := sorted(record.keys() - _TOP):
        raise RecordError(f"{name}: unknown fields {unknown}")
    if record["schema"] != SCHEMA:
        raise RecordError(f"{name}: schema {record['schema']}, this reads {SCHEMA}")
    try:
        datetime.date.fromisoformat(record["created"])
    except ValueError:
        raise RecordError(
            f"{name}: created is {record['created']!r}, expected a date as 2026-01-31"
        ) from None
    for key in ("name", "sha256"):
        _expect(record["data"].get(key), str, f"{name}: data.{key}")
    if not record["runs"]:
        raise RecordError(f"{name}: there are no runs")
    for position, run in enumerate(record["runs"]):
        _validate_run(run, f"{name}: runs[{position}]")
    try:
        json.dumps(record, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RecordError(f"{name}: not JSON: {error}") from None


def _validate_run(run: Any, where: str) -> None:
    _expect(run, dict, where)
    for key, (kinds, needed) in _RUN.items():
        if key in run:
            _expect(run[key], kinds, f"{where}.{key}")
        elif needed:
            raise RecordError(f"{where}: field {key!r} is missing")
    for key in ("hardware", "versions") if "machine" in run else ():
        _expect(run["machine"].get(key), dict, f"{where}.machine.{key}")
    for value in run["loss"]:
        if value is not None:
            _expect(value, (int, float), f"{where}.loss: an item")
    for pair in run.get("eval_loss", []):
        if not isinstance(pair, list) or len(pair) != 2:
            raise RecordError(f"{where}.eval_loss: {pair!r} is not [step, loss]")
    texts = {k: run[k] for k in ("predictions", "references", "slices") if k in run}
    lengths = {key: len(values) for key, values in texts.items()}
    if len(set(lengths.values())) > 1:
        raise RecordError(f"{where}: lengths differ: {lengths}")
    for key, values in texts.items():
        for value in values:
            _expect(value, str, f"{where}.{key}: an item")


def runs_folder() -> Path:
    """The folder of the recorded runs."""
    return data_folder() / "runs"


def list_records() -> list[str]:
    """Names of all records, in order."""
    return sorted(path.stem for path in runs_folder().glob("*.json"))


def load_record(name: str) -> dict[str, Any]:
    """Read and validate one record.

    Args:
        name: the file's name without `.json`.

    Raises:
        RecordError: there is no such record, or it is malformed.
    """
    path = runs_folder() / f"{name}.json"
    if name not in list_records():
        known = ", ".join(list_records()) or "none"
        raise RecordError(f"no record {name!r}; recorded: {known}")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{path.name} is not JSON: {error}") from None
    validate_record(record)
    if record["name"] != name:
        raise RecordError(f"{path.name} holds the record {record['name']!r}")
    return record


def save_record(name: str, record: Mapping[str, Any]) -> Path:
    """Compute metrics and summary, validate, and write a record in one stroke.

    A reader sees the old file or the new one, never half of one.

    Args:
        name: `<NN>_<what>`, the file's name without `.json`.
        record: all fields but `schema`, `name` and `summary`, which are set here;
            `created` defaults to today. Each run's `metrics` names its metrics; their
            values are computed. Losses that are not finite become null.

    Returns:
        The path written.

    Raises:
        RecordError: as in `validate_record` and `recompute`.
    """
    today = datetime.date.today().isoformat()
    record = {"schema": SCHEMA, "name": name, "created": today} | dict(record)
    record |= {"schema": SCHEMA, "name": name, "summary": {}}
    runs = [dict(run) for run in record.get("runs", [])]
    for run in runs:
        for key in run.keys() & {"loss", "eval_loss", "measured"}:
            run[key] = finite(run[key])
        if not isinstance(run.get("metrics"), dict):
            run["metrics"] = dict.fromkeys(run.get("metrics") or ())
    record["runs"] = runs
    validate_record(record)
    record = recompute(record)
    validate_record(record)
    folder = runs_folder()
    folder.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(_as_text(record))
        os.chmod(draft, 0o644)
        replace_file(draft, folder / f"{name}.json")
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise
    return folder / f"{name}.json"


def _as_text(record: dict[str, Any]) -> str:
    """JSON with one line a field and one line a run, so that a change shows."""

    def dump(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    lines = []
    for key, value in record.items():
        if key == "runs":
            body = "[\n  " + ",\n  ".join(map(dump, value)) + "\n ]"
        else:
            body = dump(value)
        lines.append(f" {dump(key)}: {body}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def lookup(path: str) -> Any:
    """Find one figure of a record, as prose names it.

    Args:
        path: `"03_lora:exact_match.lora"`: the record, then keys into its summary, or,
            where the summary lacks the first one, into the record itself
            (`"03_lora:runs.0.metrics.exact_match"`). A key may hold dots.

    Raises:
        RecordError: there is no such record or key; names the keys there are.

    """
    name, colon, keys = path.partition(":")
    if not colon or not keys:
        raise RecordError(f"{path!r} is not of the form 'record:key.key'")
    record = load_record(name)
    for root in (record["summary"], record):
        if _first_key(root, keys):
            return _walk(root, keys, path)
    known = ", ".join([*record["summary"], *_TOP])
    raise RecordError(f"{path}: no key {keys!r}; there are {known}")


def _first_key(value: Any, keys: str) -> str | None:
    """The longest key of `value` with which `keys` begins."""
    if isinstance(value, list):
        first = keys.partition(".")[0]
        return first if first.isdigit() and int(first) < len(value) else None
    if not isinstance(value, dict):
        return None
    fits = [key for key in value if keys == key or keys.startswith(f"{key}.")]
    return max(fits, key=len, default=None)


def _walk(value: Any, keys: str, path: str) -> Any:
    while keys:
        key = _first_key(value, keys)
        if key is None:
            there = (
                ", ".join(value) if isinstance(value, dict) else type(value).__name__
            )
            raise RecordError(f"{path}: nothing at {keys!r}; there is {there}")
        value = value[int(key)] if isinstance(value, list) else value[key]
        keys = keys[len(key) + 1 :]
    return value
