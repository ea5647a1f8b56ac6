"""The methods of the sweep as the records have them. `method_results` offers these."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from course_utils import records
from course_utils.experiment_lists_08 import SEEDS, best_of
from course_utils.figure_style import method_of

FAMILIES = ("08_low_rank", "08_others")
# A few steps of each method, timed with nothing else on the machine.
SPEED = "08_speed"
# Longer runs of other lessons, on the same data: record, label of the run.
LONG = (
    ("02_full", "full"),
    ("03_lora", "LoRA"),
    ("05_long", "prompt"),
    ("06_prefix", "prefix"),
)


@dataclass(frozen=True)
class MethodResult:
    """One method at the learning rate of its lowest validation loss.

    Shares are 0 to 1. Tuples have one value a seed, the first seed first; they are
    empty, and single values None, where nothing was measured.

    Attributes:
        name: as the record calls it, without the rate.
        method: its key in `figure_style`, or the name where it has none.
        learning_rate: best by the first seed's validation loss; None if untrained.
        rates: {rate: (final validation loss, exact match, field F1)}, first seed.
        exact_match, field_f1, eval_loss: over the seeds.
        early_loss: validation loss after a quarter of the steps, mean; nats a token.
        by_slice, by_field: {name: share}, means.
        trainable_parameters: a count.
        adapter_bytes: to be kept for each task.
        peak_bytes: the most that tensors took in one step, of the first seed.
        seconds: of the training alone, mean. Where the record `08_speed` has the
            method, of that record's steps, carried on to all steps.
        tokens_per_s: mean, of the same record.
        general_before, general_after: share of general questions answered, without
            and with the training.
        complete: the best rate is inside its grid, and all seeds ended with a loss.
        record: the name of the record it is from.
    """

    name: str
    method: str
    learning_rate: float | None = None
    rates: dict[float, tuple[float | None, float | None, float | None]] | None = None
    exact_match: tuple[float, ...] = ()
    field_f1: tuple[float, ...] = ()
    eval_loss: tuple[float, ...] = ()
    early_loss: float | None = None
    by_slice: dict[str, float] | None = None
    by_field: dict[str, float] | None = None
    trainable_parameters: int = 0
    adapter_bytes: int | None = None
    peak_bytes: int | None = None
    seconds: float | None = None
    tokens_per_s: float | None = None
    general_before: float | None = None
    general_after: float | None = None
    complete: bool = False
    record: str = ""

    def __post_init__(self) -> None:
        for name in ("rates", "by_slice", "by_field"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, {})

    @property
    def score(self) -> float | None:
        """Mean exact match, 0 to 1."""
        return mean(self.exact_match)

    @property
    def loss(self) -> float | None:
        """Mean final validation loss, nats a token."""
        return mean(self.eval_loss)


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of what is there; None of nothing.

    >>> mean([1.0, None, 2.0]), mean([])
    (1.5, None)
    """
    known = [v for v in values if v is not None and math.isfinite(v)]
    return math.fsum(known) / len(known) if known else None


def _known(values: Iterable[float | None]) -> tuple[float, ...]:
    return tuple(v for v in values if v is not None and math.isfinite(v))


def _means(dicts: Iterable[dict[str, float]]) -> dict[str, float]:
    dicts = list(dicts)
    names = dict.fromkeys(name for one in dicts for name in one)
    return {name: mean(one.get(name) for one in dicts) for name in names}


def _exact(run: dict) -> float | None:
    metrics = run["metrics"]
    return metrics.get("exact_match", metrics.get("exact_text"))


def _final(run: dict) -> float | None:
    """Validation loss at the end; None where it is not a number."""
    return run["eval_loss"][-1][1] if run.get("eval_loss") else None


def _early(run: dict) -> float | None:
    """Validation loss first measured from a quarter to a half of the steps."""
    steps, pairs = run["settings"]["steps"], run.get("eval_loss", [])
    return next((v for step, v in pairs if steps / 4 <= step <= steps / 2), None)


def result_of(name: str, runs: Sequence[dict]) -> MethodResult:
    """Read one method's result from its runs.

    Args:
        name: the method's name.
        runs: at one rate or several, with one seed or several, metrics computed.
    """
    runs = sorted(runs, key=lambda run: run["seed"])
    first = {
        run["settings"]["learning_rate"]: run for run in reversed(runs) if run["loss"]
    }
    rates = {
        rate: (
            _final(first[rate]),
            _exact(first[rate]),
            first[rate]["metrics"].get("field_f1"),
        )
        for rate in sorted(first)
    }
    best, chosen, inside = None, runs, True
    if rates:
        best = best_of({rate: values[0] for rate, values in rates.items()})
        chosen = [r for r in runs if r["settings"]["learning_rate"] == best]
        inside = min(rates) < best < max(rates)
    seeds = {run["seed"] for run in chosen}
    measured = [run.get("measured", {}) for run in chosen]
    general = [m["general_questions"] for m in measured if "general_questions" in m]

    # Bytes and seconds are of one machine, the record's own, where it made a run.
    here = [run for run in chosen if "machine" not in run] or chosen

    def over(key: str, these: Sequence[dict] = here) -> float | None:
        return mean(run.get("measured", {}).get(key) for run in these)

    def whole(
        key: str, untrained: int | None, these: Sequence[dict] = here
    ) -> int | None:
        value = over(key, these)
        return (None if best else untrained) if value is None else round(value)

    metrics = [run["metrics"] for run in chosen]
    return MethodResult(
        name=name,
        method=method_of(name) or name,
        learning_rate=best,
        rates=rates,
        exact_match=_known(map(_exact, chosen)),
        field_f1=_known(m.get("field_f1") for m in metrics),
        eval_loss=_known(map(_final, chosen)),
        early_loss=mean(map(_early, chosen)) if best else None,
        by_slice=_means(m.get("by_slice") or {} for m in metrics),
        by_field=_means(m.get("by_field") or {} for m in metrics),
        trainable_parameters=chosen[0].get("trainable_parameters", 0),
        adapter_bytes=whole("adapter_bytes", 0),
        peak_bytes=whole("peak_bytes", None, here[:1]),  # seeds have other batches
        seconds=over("train_seconds") if best else 0.0,
        tokens_per_s=mean(run.get("tokens_per_s") for run in here),
        general_before=mean(g["before"]["answer_share"] for g in general),
        general_after=mean(g["after"]["answer_share"] for g in general),
        complete=not best
        or (inside and seeds >= set(SEEDS) and None not in map(_final, chosen)),
    )


def recorded_methods(names: Sequence[str] = FAMILIES) -> list[MethodResult]:
    """Read every method that the sweep has begun.

    Args:
        names: records; one that is not there is left out.

    Returns:
        One result a method, in the order of the records; untrained ones included.
    """
    there = set(records.list_records())
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in names:
        if record not in there:
            continue
        for run in records.load_record(record)["runs"]:
            name = run["label"].rpartition(" lr ")[0] or run["label"]
            groups.setdefault((record, name), []).append(run)
    timed: dict[str, list[dict]] = {}
    for run in records.load_record(SPEED)["runs"] if SPEED in there else []:
        timed.setdefault(run["label"], []).append(run)
    return [
        replace(result_of(name, runs), record=record, **_speed(timed.get(name), runs))
        for (record, name), runs in groups.items()
    ]


def _speed(timed: list[dict] | None, runs: list[dict]) -> dict[str, float | None]:
    """Seconds and tokens/s of runs that were timed apart, for the steps of `runs`."""
    if not timed:
        return {}
    step = mean(r["measured"]["train_seconds"] / r["settings"]["steps"] for r in timed)
    return {
        "seconds": step * runs[0]["settings"]["steps"],
        "tokens_per_s": mean(run.get("tokens_per_s") for run in timed),
    }


def path_of(result: MethodResult, figure: str = "exact_match") -> str:
    """Name a recorded figure at the method's best rate as `records.lookup` does.

    >>> path_of(MethodResult("LoRA", "lora", 0.01, record="08_low_rank"))
    '08_low_rank:exact_match.LoRA lr 0.01'
    """
    rate = "" if result.learning_rate is None else f" lr {result.learning_rate:g}"
    return f"{result.record}:{figure}.{result.name}{rate}"


def long_runs() -> dict[str, float]:
    """Exact match after the longer runs of other lessons, where they are recorded.

    Returns:
        {"LoRA, long (150 x 8)": share}: in brackets optimiser steps and examples in
        each. Longer than the sweep's runs, on other test sentences of the same set,
        and with one seed.
    """
    there, found = set(records.list_records()), {}
    for record, label in LONG:
        runs = records.load_record(record)["runs"] if record in there else []
        for run in runs:
            if run["label"] == label and "exact_match" in run["metrics"]:
                made = run["settings"]
                size = f"{made['steps']} x {made['batch_size']}"
                found[f"{label}, long ({size})"] = run["metrics"]["exact_match"]
    return found
