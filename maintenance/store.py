"""The store of recorded runs: their schema, saving, and figures computed again.

`course_utils.records` says what a record is, and reads them.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import json
import math
import os
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from course_utils import classification, records, scoring
from course_utils.records import RecordError
from course_utils.runtime import cpu_has_bf16, memory_gib, replace_file

SCHEMA = json.loads(Path(__file__).with_name("record_schema.json").read_text("utf-8"))


def validate_record(record: Any) -> None:
    """Check a record against `SCHEMA`, and what a schema cannot say; or RecordError."""
    from jsonschema import Draft202012Validator

    name = record.get("name", "a record") if isinstance(record, dict) else "a record"
    formats = Draft202012Validator.FORMAT_CHECKER
    validator = Draft202012Validator(SCHEMA, format_checker=formats)
    for error in validator.iter_errors(record):
        raise RecordError(f"{name}: {error.json_path}: {error.message}"[:500])
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

    A reader sees the old file or the new one, never half of one. Each run's `metrics`,
    values or mere names, are computed again; what is not finite becomes null.
    Raises RecordError: as in `validate_record` and `recompute`.
    """
    top = {"schema": 1, "name": name, "created": f"{datetime.date.today()}"}
    record = top | dict(record) | {"schema": 1, "name": name, "summary": {}}
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
    draft = folder / f".{name}.{os.getpid()}.tmp"
    try:
        draft.write_text(_as_text(record), encoding="utf-8", newline="\n")
        replace_file(draft, folder / f"{name}.json")
    finally:
        draft.unlink(missing_ok=True)
    return folder / f"{name}.json"


def _finite(value: Any) -> Any:
    """The value, with null for what is NaN or infinite in it: JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_text(record: dict[str, Any]) -> str:
    """JSON with one line a field and one line a run, so that a change shows."""

    def dump(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    fields = {key: dump(value) for key, value in record.items()}
    fields["runs"] = "[\n  " + ",\n  ".join(map(dump, record["runs"])) + "\n ]"
    lines = [f" {dump(key)}: {text}" for key, text in fields.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


# --- figures that follow from a record ---------------------------------------------

Metric = Callable[[Mapping[str, Any]], Any]
Summary = Callable[[list[dict]], dict[str, Any]]


def _of_answers(score: Callable[..., Any], *more: Any, part: str = "") -> Metric:
    """A score of a run's answers, or of those to another set, which it measured."""

    def compute(run: Mapping[str, Any]) -> Any:
        answers = run["measured"][part] if part else run
        names = ["predictions", "references"] + ["slices"] * (score is scoring.by_slice)
        return score(*(answers[name] for name in names), *more)

    return compute


def _of_texts(function: Callable[..., float]) -> Metric:
    """A figure of what was measured on the texts of each set, by set."""
    names = ("kl", "tokens", "loss_before", "loss_after")

    def compute(run: Mapping[str, Any]) -> dict[str, float]:
        by_set = [run["measured"][name] for name in names]
        return {name: function(*(sums[name] for sums in by_set)) for name in by_set[0]}

    return compute


def _ratio_error(sums: Sequence[float], counts: Sequence[int]) -> float:
    """Standard error of Σ sums / Σ counts, taking the texts as drawn at random."""
    mean, n = math.fsum(sums) / sum(counts), len(sums)
    squares = [(s - mean * c) ** 2 for s, c in zip(sums, counts, strict=True)]
    return math.sqrt(n / (n - 1) * math.fsum(squares)) / sum(counts)


def _weight_error(m: Mapping[str, Any]) -> float:
    return math.sqrt(math.fsum(m["squared_error"]) / math.fsum(m["squared_norm"]))


def _last_known(values: Iterable[float | None]) -> float | None:
    return next((v for v in reversed([*values]) if v is not None), None)


def _measured(function: Callable[[dict], float]) -> Metric:
    return lambda run: function(run["measured"])


def _best_rate(measured: Mapping[str, Any]) -> float:
    """The lowest of the rates that came to the loss in the fewest steps."""
    reached = ((n, float(rate)) for rate, n in measured["steps"].items() if n)
    return min(reached)[1]


# How each metric of a run is computed from the run.
METRICS: dict[str, Metric] = {
    "final_loss": lambda run: _last_known(run["loss"]),
    "final_eval_loss": lambda run: _last_known(loss for _, loss in run["eval_loss"]),
    "exact_match": _of_answers(scoring.exact_match),
    "exact_text": _of_answers(scoring.exact_text),
    "field_f1": _of_answers(scoring.field_f1),
    "by_field": _of_answers(scoring.by_field),
    "by_slice": _of_answers(scoring.by_slice),
    "field_f1_by_slice": _of_answers(scoring.by_slice, scoring.field_f1),
    "accuracy": _of_answers(classification.accuracy),
    "macro_f1": _of_answers(classification.macro_f1),
    "accuracy_by_slice": _of_answers(scoring.by_slice, classification.accuracy),
    "validation_exact_match": _of_answers(scoring.exact_match, part="validation"),
    "also_test_exact_match": _of_answers(scoring.exact_match, part="also_test"),
    "also_test_by_slice": _of_answers(scoring.by_slice, part="also_test"),
    "weight_error": _measured(_weight_error),
    # Nats a token.
    "kl": _of_texts(lambda kl, n, *_: math.fsum(kl) / sum(n)),
    "kl_standard_error": _of_texts(lambda kl, n, *_: _ratio_error(kl, n)),
    "loss_change": _of_texts(
        lambda _, n, old, new: (math.fsum(new) - math.fsum(old)) / sum(n)
    ),
    # Lesson 11's trainings to a loss.
    "best_rate": _measured(_best_rate),
    "fewest_steps": _measured(lambda m: min(n for n in m["steps"].values() if n)),
    "noise_scale": _measured(lambda m: m["noise"][-1]),
    # A step on a card: predicted bytes through measured ones, at its peak and between
    # steps; GiB = 2**30 bytes.
    "memory_ratio": _measured(lambda m: m["predicted_bytes"] / m["peak_bytes"]),
    "kept_ratio": _measured(lambda m: m["predicted_kept_bytes"] / m["kept_bytes"]),
    "predicted_gib": _measured(lambda m: m["predicted_bytes"] / 2**30),
    "measured_gib": _measured(lambda m: m["peak_bytes"] / 2**30),
    "step_s": _measured(lambda m: m["step_seconds"]),
    "peak_bytes": _measured(lambda m: m["peak_bytes"]),
}


def compute_metrics(run: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Compute figures of a run from what it holds; KeyError where it lacks that."""
    return {name: METRICS[name](run) for name in names}


def _card_summary(runs: list[dict]) -> dict[str, Any]:
    """How near predictions came, over all cases and by label; failures in words."""
    cases = {run["label"]: run for run in runs if run["metrics"]}
    measured = {label: run["measured"] for label, run in cases.items()}
    every = {run["label"]: run["measured"] for run in runs}
    off = [abs(run["metrics"]["memory_ratio"] - 1) for run in cases.values()]
    summary: dict[str, Any] = {
        "cases": len(runs),
        "measured": len(cases),
        "as_on_a_t4": sum(run["settings"]["way"] == "T4" for run in cases.values()),
        "within_10_percent": sum(error <= 0.1 for error in off),
        "mean_error": fmean(off) if off else None,
        "greatest_error": max(off, default=None),
        "failed": {name: m["failed"] for name, m in every.items() if "failed" in m},
        "did_not_fit": [name for name, m in every.items() if "did_not_fit" in m],
    }
    for key in ("predicted_bytes", "peak_bytes", "kept_bytes", "workspace_bytes"):
        summary[key] = {label: m[key] for label, m in measured.items() if key in m}
    summary["rounding_bytes"] = {  # what the allocator hands out above what is asked
        label: m["peak_bytes"] + m["before_bytes"] - m["requested_bytes"]
        for label, m in measured.items()
        if m.get("requested_bytes")
    }
    for label, run in cases.items():
        for key, value in run["metrics"].items():
            summary.setdefault(key, {})[label] = value
    return summary


def _course_summary(runs: list[dict]) -> dict[str, Any]:
    """By lesson, and `most_bytes`: the peak of the largest, where it is known."""
    summary: dict[str, Any] = default_summary(runs)
    if peaks := summary.get("peak_bytes"):
        summary["most_bytes"] = max(peaks.values())
    return summary


def default_summary(runs: list[dict]) -> dict[str, dict[str, Any]]:
    """{metric: {label: mean over the seeds}}, `metric_min` and `metric_max` alike."""
    grouped: dict[str, list[dict]] = {}
    for run in runs:
        grouped.setdefault(run["label"], []).append(run)
    summary: dict[str, dict[str, Any]] = {}
    for label, group in grouped.items():
        seconds = fmean(run["seconds"] for run in group)
        figures: dict[str, Any] = {"seeds": len(group), "seconds": seconds}
        if "trainable_parameters" in group[0]:
            figures["trainable_parameters"] = group[0]["trainable_parameters"]
        for key, first in group[0]["metrics"].items():
            values = [run["metrics"].get(key) for run in group]
            if isinstance(first, dict):
                figures[key] = {
                    name: fmean(value[name] for value in values if name in value)
                    for name in first
                }
            elif all(isinstance(value, int | float) for value in values):
                figures[key] = fmean(values)
                figures[f"{key}_min"], figures[f"{key}_max"] = min(values), max(values)
        for key, figure in figures.items():
            summary.setdefault(key, {})[label] = figure
    return summary


# How the summary of a record is computed, where not by `default_summary`.
SUMMARIES: dict[str, Summary] = {
    "07_card": _card_summary,
    "course_cpu": _course_summary,
}


def recompute(record: Mapping[str, Any]) -> dict[str, Any]:
    """Compute each run's metrics, and the record's summary, again, in a copy.

    The copy equals the record if nobody edited it.
    Raises RecordError: a metric has no function, or lacks what it is computed from.
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
            run["metrics"] = compute_metrics(run, run["metrics"])
        except KeyError as error:
            raise RecordError(f"{where}: a metric needs {error}") from None
    summarise = SUMMARIES.get(record["name"], default_summary)
    record["summary"] = json.loads(json.dumps(summarise(record["runs"])))
    return record


# --- the machine -------------------------------------------------------------------


def hardware() -> dict[str, Any]:
    """Describe this machine: processor, cores, memory in GiB, card if any."""
    import torch

    described: dict[str, Any] = {
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
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
