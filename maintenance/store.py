"""The store of recorded runs: their schema, saving, and figures computed again.

`course_utils.records` says what a record is, and reads them.
"""

from __future__ import annotations

import copy
import datetime
import json
import math
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from course_utils import classification, records, scoring
from course_utils.records import RecordError
from course_utils.runtime import cpu_has_bf16, memory_gib, replace_file
from course_utils.sweep.experiment import METRICS as SWEEP_METRICS
from course_utils.sweep.experiment import compute_metrics

# --- the schema --------------------------------------------------------------------

_TEXTS = {"type": "array", "items": {"type": "string"}}
_LOSS = {"type": ["number", "null"]}
_MACHINE = {
    "type": "object",
    "required": ["hardware", "versions"],
    "properties": {"hardware": {"type": "object"}, "versions": {"type": "object"}},
}
_RUN = {
    "type": "object",
    "required": ["label", "settings", "seed", "loss", "metrics", "seconds"],
    "properties": {
        "label": {"type": "string"},
        "settings": {"type": "object"},
        "seed": {"type": "integer"},
        "loss": {"type": "array", "items": _LOSS},
        "eval_loss": {
            "type": "array",
            "items": {"type": "array", "minItems": 2, "maxItems": 2, "items": _LOSS},
        },
        "predictions": _TEXTS,
        "references": _TEXTS,
        "slices": _TEXTS,
        "metrics": {"type": "object"},
        "measured": {"type": "object"},
        "trainable_parameters": {"type": "integer"},
        "tokens_per_s": {"type": "number"},
        "seconds": {"type": "number"},
        "machine": _MACHINE,
    },
}
SCHEMA = {
    "type": "object",
    "required": [
        *("schema", "name", "command", "created", "hardware", "versions", "data"),
        *("seconds", "runs", "summary"),
    ],
    "additionalProperties": False,
    "properties": {
        "schema": {"const": 1},
        "name": {"type": "string"},
        "command": {"type": "string"},
        "created": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
        "hardware": {"type": "object"},
        "versions": {"type": "object"},
        "data": {
            "type": "object",
            "required": ["name", "sha256"],
            "properties": {"name": {"type": "string"}, "sha256": {"type": "string"}},
        },
        "seconds": {"type": "number"},
        "runs": {"type": "array", "minItems": 1, "items": _RUN},
        "summary": {"type": "object"},
    },
}


def validate_record(record: Any) -> None:
    """Check a record against `SCHEMA`, and what a schema cannot say.

    Raises:
        RecordError: where in the record, and what was expected there.
    """
    from jsonschema import Draft202012Validator

    name = record.get("name", "a record") if isinstance(record, dict) else "a record"
    for error in Draft202012Validator(SCHEMA).iter_errors(record):
        raise RecordError(f"{name}: {error.json_path}: {error.message}"[:500])
    try:
        datetime.date.fromisoformat(record["created"])
    except ValueError:
        raise RecordError(f"{name}: created {record['created']!r} is no date") from None
    for position, run in enumerate(record["runs"]):
        texts = ("predictions", "references", "slices")
        lengths = {key: len(run[key]) for key in texts if key in run}
        if len(set(lengths.values())) > 1:
            raise RecordError(f"{name}: runs[{position}]: lengths differ: {lengths}")
    try:
        json.dumps(record, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RecordError(f"{name}: not JSON: {error}") from None


# --- saving ------------------------------------------------------------------------


def save_record(name: str, record: Mapping[str, Any]) -> Path:
    """Compute metrics and summary, validate, and write a record in one stroke.

    A reader sees the old file or the new one, never half of one.

    Args:
        name: `<NN>_<what>`, the file's name without `.json`.
        record: all fields but `schema`, `name` and `summary`, which are set here;
            `created` defaults to today. Each run's `metrics`, values or mere names,
            are computed again. Losses that are not finite become null.

    Returns:
        The path written.

    Raises:
        RecordError: as in `validate_record` and `recompute`.
    """
    today = datetime.date.today().isoformat()
    record = {"schema": 1, "name": name, "created": today} | dict(record)
    record |= {"schema": 1, "name": name, "summary": {}}
    runs = [dict(run) for run in record.get("runs", [])]
    for run in runs:
        for key in run.keys() & {"loss", "eval_loss", "measured"}:
            run[key] = _finite(run[key])
        run["metrics"] = dict.fromkeys(run.get("metrics") or ())
    record["runs"] = runs
    validate_record(record)
    record = recompute(record)
    validate_record(record)
    folder = records.runs_folder()
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


def _finite(value: Any) -> Any:
    """The value, with null for what is NaN or infinite in it: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    bad = isinstance(value, float) and not math.isfinite(value)
    return None if bad else value


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


# --- figures that follow from a record ---


def _by_text(run: dict, function: Callable[..., float]) -> dict[str, float]:
    """Apply a function to what was measured on the texts of each set."""
    found = run["measured"]
    return {
        name: function(
            *(found[key][name] for key in ("kl", "tokens", "loss_before", "loss_after"))
        )
        for name in found["kl"]
    }


def _ratio_error(sums: Sequence[float], counts: Sequence[int]) -> float:
    """Standard error of Σ sums / Σ counts, taking the texts as drawn at random."""
    mean = math.fsum(sums) / sum(counts)
    left = [s - mean * c for s, c in zip(sums, counts, strict=True)]
    n = len(left)
    return math.sqrt(n / (n - 1) * math.fsum(x * x for x in left)) / sum(counts)


# How each metric of a run is computed from the run.
METRICS: dict[str, Callable[[Mapping[str, Any]], Any]] = SWEEP_METRICS | {
    "field_f1_by_slice": lambda run: scoring.by_slice(
        run["predictions"], run["references"], run["slices"], scoring.field_f1
    ),
    "accuracy_by_slice": lambda run: scoring.by_slice(
        run["predictions"], run["references"], run["slices"], classification.accuracy
    ),
    # Of answers to other sets, which stand in `measured` as a run's own stand in it.
    "validation_exact_match": lambda run: SWEEP_METRICS["exact_match"](
        run["measured"]["validation"]
    ),
    "also_test_exact_match": lambda run: SWEEP_METRICS["exact_match"](
        run["measured"]["also_test"]
    ),
    "also_test_by_slice": lambda run: SWEEP_METRICS["by_slice"](
        run["measured"]["also_test"]
    ),
    "weight_error": lambda run: math.sqrt(
        math.fsum(run["measured"]["squared_error"])
        / math.fsum(run["measured"]["squared_norm"])
    ),
    # Nats a token, by set of texts.
    "kl": lambda run: _by_text(run, lambda kl, n, *_: math.fsum(kl) / sum(n)),
    "kl_standard_error": lambda run: _by_text(
        run, lambda kl, n, *_: _ratio_error(kl, n)
    ),
    "loss_change": lambda run: _by_text(
        run, lambda _, n, old, new: (math.fsum(new) - math.fsum(old)) / sum(n)
    ),
    # A step on a card: predicted bytes through measured ones, at its peak and between
    # steps; GiB = 2**30 bytes.
    "memory_ratio": lambda run: (
        run["measured"]["predicted_bytes"] / run["measured"]["peak_bytes"]
    ),
    "kept_ratio": lambda run: (
        run["measured"]["predicted_kept_bytes"] / run["measured"]["kept_bytes"]
    ),
    "predicted_gib": lambda run: run["measured"]["predicted_bytes"] / 2**30,
    "measured_gib": lambda run: run["measured"]["peak_bytes"] / 2**30,
    "step_s": lambda run: run["measured"]["step_seconds"],
}


_summaries: dict[str, Callable[[list[dict]], dict]] = {}


def summary_of(
    name: str,
) -> Callable[[Callable[[list[dict]], dict]], Callable[[list[dict]], dict]]:
    """Decorator: the function computes the summary of the record `name` from its runs.

    Raises:
        ValueError: the record has a summary function already.
    """
    if name in _summaries:
        raise ValueError(f"the record {name!r} has a summary already")

    def register(function: Callable[[list[dict]], dict]) -> Callable:
        _summaries[name] = function
        return function

    return register


@summary_of("07_card")
def _card_summary(runs: list[dict]) -> dict[str, Any]:
    """How near predictions came, over all cases and by label; failures in words."""
    cases = {run["label"]: run for run in runs if run["metrics"]}
    off = [abs(run["metrics"]["memory_ratio"] - 1) for run in cases.values()]
    found = {label: run["measured"] for label, run in cases.items()}
    summary: dict[str, Any] = {
        "cases": len(runs),
        "measured": len(cases),
        "as_on_a_t4": sum(run["settings"]["way"] == "T4" for run in cases.values()),
        "within_10_percent": sum(one <= 0.1 for one in off),
        "mean_error": _mean(off) if off else None,
        "greatest_error": max(off, default=None),
        "failed": {
            run["label"]: run["measured"]["failed"]
            for run in runs
            if "failed" in run["measured"]
        },
        "did_not_fit": [
            run["label"] for run in runs if "did_not_fit" in run["measured"]
        ],
    }
    for key in ("predicted_bytes", "peak_bytes", "kept_bytes", "workspace_bytes"):
        summary[key] = {label: m[key] for label, m in found.items() if key in m}
    summary["rounding_bytes"] = {  # what the allocator hands out above what is asked
        label: m["peak_bytes"] + m["before_bytes"] - m["requested_bytes"]
        for label, m in found.items()
        if m.get("requested_bytes")
    }
    keys = dict.fromkeys(key for run in cases.values() for key in run["metrics"])
    return summary | {
        key: {label: run["metrics"][key] for label, run in cases.items()}
        for key in keys
    }


def default_summary(runs: list[dict]) -> dict[str, dict[str, Any]]:
    """Summarise runs by label: mean, least and greatest of each metric over the seeds.

    Returns:
        {metric: {label: mean}}, `metric_min` and `metric_max` alike; `by_slice` as
        {label: {slice: mean}}; `seeds`, `seconds` (mean), `trainable_parameters`.
    """
    grouped: dict[str, list[dict]] = {}
    for run in runs:
        grouped.setdefault(run["label"], []).append(run)
    summary: dict[str, dict[str, Any]] = {}

    def put(key: str, label: str, value: Any) -> None:
        summary.setdefault(key, {})[label] = value

    for label, group in grouped.items():
        put("seeds", label, len(group))
        put("seconds", label, _mean([run["seconds"] for run in group]))
        if "trainable_parameters" in group[0]:
            put("trainable_parameters", label, group[0]["trainable_parameters"])
        for key, first in group[0]["metrics"].items():
            values = [run["metrics"].get(key) for run in group]
            if isinstance(first, dict):
                means = {
                    name: _mean([value[name] for value in values if name in value])
                    for name in first
                }
                put(key, label, means)
            elif all(isinstance(value, int | float) for value in values):
                put(key, label, _mean(values))
                put(f"{key}_min", label, min(values))
                put(f"{key}_max", label, max(values))
    return summary


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def recompute(record: Mapping[str, Any]) -> dict[str, Any]:
    """Compute each run's metrics and the record's summary again.

    Args:
        record: a record; `metrics` of a run says which metrics it has. Its summary
            function is the one given to `summary_of`, else `default_summary`.

    Returns:
        A copy with computed figures, equal to the record if nobody edited it.

    Raises:
        RecordError: a metric has no function, or lacks what it is computed from.
    """
    record = copy.deepcopy(dict(record))
    for position, run in enumerate(record["runs"]):
        where = f"{record['name']}: runs[{position}]"
        if unknown := [key for key in run["metrics"] if key not in METRICS]:
            raise RecordError(
                f"{where}: nothing computes the metric {unknown[0]!r}; add it to "
                "`METRICS`, or put a measured number under 'measured'"
            )
        try:
            run["metrics"] = compute_metrics(run, run["metrics"], METRICS)
        except KeyError as error:
            raise RecordError(f"{where}: a metric needs {error}") from None
    summarise = _summaries.get(record["name"], default_summary)
    record["summary"] = json.loads(json.dumps(summarise(record["runs"])))
    return record


def differences(record: Mapping[str, Any]) -> list[str]:
    """Say where a record differs from what its own data give; empty if nowhere."""
    return list(_differ(dict(record), recompute(record), ""))


def _differ(stored: Any, computed: Any, path: str) -> Iterator[str]:
    if isinstance(stored, dict) and isinstance(computed, dict):
        for key in dict.fromkeys([*stored, *computed]):
            here = f"{path}.{key}" if path else str(key)
            if key not in stored or key not in computed:
                side = "not stored" if key not in stored else "not computed"
                yield f"{here}: {side}"
            else:
                yield from _differ(stored[key], computed[key], here)
    elif isinstance(stored, list) and isinstance(computed, list):
        if len(stored) != len(computed):
            yield f"{path}: {len(stored)} items stored, {len(computed)} computed"
            return
        for position, pair in enumerate(zip(stored, computed, strict=True)):
            yield from _differ(*pair, f"{path}[{position}]")
    elif isinstance(stored, float) and isinstance(computed, int | float):
        if not math.isclose(stored, computed, rel_tol=1e-9, abs_tol=1e-12):
            yield f"{path}: {stored} stored, {computed} computed"
    elif stored != computed:
        yield f"{path}: {stored!r} stored, {computed!r} computed"


# --- the machine ---


def hardware() -> dict[str, Any]:
    """Describe this machine: processor, cores, memory in GiB, card if any."""
    import torch

    described = {
        "system": platform.system(),
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": memory_gib(),
        "bf16": cpu_has_bf16(),
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
        total = torch.cuda.get_device_properties(0).total_memory
        described["gpu_gib"] = round(total / 2**30, 2)
    return described


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
