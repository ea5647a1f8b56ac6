"""Compute a record's figures from its data: metrics of a run, summary of all runs.

`records` offers these names and says what a record is.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from course_utils import classification, scoring


class RecordError(ValueError):
    """A record is missing, malformed, or says what its data do not."""


def _last(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return known[-1] if known else None


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


def finite(value: Any) -> Any:
    """The value, with null for what is NaN or infinite in it: JSON has neither.

    Args:
        value: lists and dicts of what JSON holds, to any depth.
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    bad = isinstance(value, float) and not math.isfinite(value)
    return None if bad else value


# How each metric of a run is computed from the run.
METRICS: dict[str, Callable[[dict], Any]] = {
    "exact_match": lambda run: scoring.exact_match(
        run["predictions"], run["references"]
    ),
    "exact_text": lambda run: scoring.exact_text(run["predictions"], run["references"]),
    "field_f1": lambda run: scoring.field_f1(run["predictions"], run["references"]),
    "by_slice": lambda run: scoring.by_slice(
        run["predictions"], run["references"], run["slices"]
    ),
    "field_f1_by_slice": lambda run: scoring.by_slice(
        run["predictions"], run["references"], run["slices"], scoring.field_f1
    ),
    "by_field": lambda run: scoring.by_field(run["predictions"], run["references"]),
    "accuracy": lambda run: classification.accuracy(
        run["predictions"], run["references"]
    ),
    "macro_f1": lambda run: classification.macro_f1(
        run["predictions"], run["references"]
    ),
    "accuracy_by_slice": lambda run: scoring.by_slice(
        run["predictions"], run["references"], run["slices"], classification.accuracy
    ),
    "validation_exact_match": lambda run: scoring.exact_match(
        *(run["measured"]["validation"][key] for key in ("predictions", "references"))
    ),
    "also_test_exact_match": lambda run: scoring.exact_match(
        *(run["measured"]["also_test"][key] for key in ("predictions", "references"))
    ),
    "also_test_by_slice": lambda run: scoring.by_slice(
        *(
            run["measured"]["also_test"][key]
            for key in ("predictions", "references", "slices")
        )
    ),
    "final_loss": lambda run: _last(run["loss"]),
    "final_eval_loss": lambda run: _last([pair[1] for pair in run["eval_loss"]]),
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


_summaries: dict[str, Callable[[list[dict]], dict]] = {"07_card": _card_summary}


def metric(name: str) -> Callable[[Callable[[dict], Any]], Callable[[dict], Any]]:
    """Decorator: the function computes the metric `name` from a run (a dict).

    Raises:
        ValueError: there is a metric of that name already.
    """
    if name in METRICS:
        raise ValueError(f"there is a metric {name!r} already")

    def register(function: Callable[[dict], Any]) -> Callable[[dict], Any]:
        METRICS[name] = function
        return function

    return register


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
        for key in run["metrics"]:
            if key not in METRICS:
                raise RecordError(
                    f"{where}: nothing computes the metric {key!r}; register it with "
                    "`metric`, or put a measured number under 'measured'"
                )
            try:
                run["metrics"][key] = METRICS[key](run)
            except KeyError as error:
                raise RecordError(f"{where}: {key} needs {error}") from None
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
