"""What the sweep of lesson 8 found, and how a reader's own points compare with it.

`recorded_methods` reads the records, `methods_table` shows them, `agreement` says
whether a reader's order is the recorded one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from course_utils import records
from course_utils.plotting.style import display_name, method_of
from course_utils.sweep.experiment import BUDGET, SEEDS, best_of

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
    rates: dict[float, tuple[float | None, float | None, float | None]] = field(
        default_factory=dict
    )
    exact_match: tuple[float, ...] = ()
    field_f1: tuple[float, ...] = ()
    eval_loss: tuple[float, ...] = ()
    early_loss: float | None = None
    by_slice: dict[str, float] = field(default_factory=dict)
    by_field: dict[str, float] = field(default_factory=dict)
    trainable_parameters: int = 0
    adapter_bytes: int | None = None
    peak_bytes: int | None = None
    seconds: float | None = None
    tokens_per_s: float | None = None
    general_before: float | None = None
    general_after: float | None = None
    complete: bool = False
    record: str = ""

    @property
    def score(self) -> float | None:
        """Mean exact match, 0 to 1."""
        return mean(self.exact_match)

    @property
    def loss(self) -> float | None:
        """Mean final validation loss, nats a token."""
        return mean(self.eval_loss)


def _known(values: Iterable[float | None]) -> tuple[float, ...]:
    return tuple(v for v in values if v is not None and math.isfinite(v))


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of what is there; None of nothing.

    >>> mean([1.0, None, 2.0]), mean([])
    (1.5, None)
    """
    known = _known(values)
    return math.fsum(known) / len(known) if known else None


def split_label(run: Mapping) -> tuple[str, float | None]:
    """Name and learning rate of a run that was made at several rates.

    >>> split_label({"label": "LoRA lr 0.01"}), split_label({"label": "full"})
    (('LoRA', 0.01), ('full', None))
    """
    name, found, rate = run["label"].rpartition(" lr ")
    return (name, float(rate)) if found else (rate, None)


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
        runs: at one rate or several, with one seed or several.
    """
    runs = sorted(runs, key=lambda run: run["seed"])
    rates, best, chosen, inside = _rates(runs), None, runs, True
    if rates:
        best = best_of({rate: values[0] for rate, values in rates.items()})
        chosen = [r for r in runs if r["settings"]["learning_rate"] == best]
        inside = min(rates) < best < max(rates)
    seeds = {run["seed"] for run in chosen}
    general = [
        run["measured"]["general_questions"]
        for run in chosen
        if "general_questions" in run.get("measured", {})
    ]
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
        general_before=mean(g["before"]["answer_share"] for g in general),
        general_after=mean(g["after"]["answer_share"] for g in general),
        complete=not best
        or (inside and seeds >= set(SEEDS) and None not in map(_final, chosen)),
        **_costs(chosen, trained=bool(best)),
    )


def _rates(
    runs: Sequence[dict],
) -> dict[float, tuple[float | None, float | None, float | None]]:
    """`MethodResult.rates`; `runs` stand in the order of their seeds."""
    first: dict[float, dict] = {}
    for run in runs:
        if run["loss"]:
            first.setdefault(run["settings"]["learning_rate"], run)
    return {
        rate: (_final(run), _exact(run), run["metrics"].get("field_f1"))
        for rate, run in sorted(first.items())
    }


def _costs(runs: Sequence[dict], *, trained: bool) -> dict[str, float | None]:
    """Bytes and seconds, of one machine: the record's own, where it made a run."""
    here = [run for run in runs if "machine" not in run] or runs

    def over(key: str, some: Sequence[dict] = here) -> float | None:
        return mean(run.get("measured", {}).get(key) for run in some)

    adapter, peak = over("adapter_bytes"), over("peak_bytes", here[:1])
    untrained = None if trained else 0
    return {
        "adapter_bytes": untrained if adapter is None else round(adapter),
        "peak_bytes": None if peak is None else round(peak),  # seeds: other batches
        "seconds": over("train_seconds") if trained else 0.0,
        "tokens_per_s": mean(run.get("tokens_per_s") for run in here),
    }


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
            groups.setdefault((record, split_label(run)[0]), []).append(run)
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


# --- the table ---

BUILTIN_PARAMETERS = 134_515_008
NONE = "–"


@dataclass(frozen=True)
class MethodsTable:
    """Methods in lines; a notebook shows it as a table, `print` as plain columns.

    Attributes:
        head: the columns' names; the first is the method.
        rows: texts, one tuple a method, as long as `head`.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        lines = [self.head, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.head))]
        return "\n".join(
            "  ".join(
                text.rjust(width) if i else text.ljust(width)
                for i, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    def _repr_markdown_(self) -> str:
        lines = [self.head, *self.rows]
        shown = ["| " + " | ".join(line) + " |" for line in lines]
        rule = "|---|" + "---:|" * (len(self.head) - 1)
        return "\n".join([shown[0], rule, *shown[1:]])


def percent(values: Sequence[float]) -> str:
    """A share in per cent; of several, their mean, smallest and largest.

    >>> percent([0.25]), percent([0.2, 0.3, 0.4]), percent([])
    ('25 %', '30 % (20–40)', '–')
    """
    if not values:
        return NONE
    middle = f"{100 * sum(values) / len(values):.0f} %"
    if len(values) == 1:
        return middle
    return f"{middle} ({100 * min(values):.0f}–{100 * max(values):.0f})"


def size(count: float | None) -> str:
    """Bytes, in the unit that keeps them short.

    >>> size(46_080), size(9_800_000), size(0), size(None)
    ('46 kB', '9.8 MB', '0', '–')
    """
    if not count:
        return NONE if count is None else "0"
    unit, divisor = ("MB", 1e6) if count >= 999_500 else ("kB", 1e3)
    value = count / divisor
    return f"{value:.0f} {unit}" if value >= 99.5 or unit == "kB" else f"{value:.2g} MB"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return NONE if value is None else f"{value:{form}}{unit}"


def order(results: Iterable[MethodResult]) -> list[MethodResult]:
    """Best first: by exact match, then by the lower validation loss, then by name."""
    far = float("inf")
    return sorted(
        results,
        key=lambda r: (
            -r.score if r.score is not None else far,
            r.loss if r.loss is not None else far,
            r.name,
        ),
    )


def methods_table(
    results: Iterable[MethodResult],
    *,
    total_parameters: int = BUILTIN_PARAMETERS,
    marked: bool = True,
) -> MethodsTable:
    """Compare methods in one table, the best score first.

    Bytes are to be kept for each task; MiB are the most that tensors took in a step
    of the training; seconds are of the training alone; general questions are those
    answered after the training.

    Args:
        results: of `recorded_methods`.
        total_parameters: of the model, for the share that is trained.
        marked: say of a method that its sweep is incomplete.
    """
    results = order(results)
    before = {round(100 * r.general_before) for r in results if r.general_before}
    general = "general questions"
    if len(before) == 1:
        general += f" (before: {before.pop()} %)"
    head = (
        *("method", "best rate", "exact match", "field F1", "validation loss"),
        *("trained parameters", "share", "file", "peak", "training", general),
    )
    rows = [_row(r, total_parameters, marked) for r in results]
    return MethodsTable(head, tuple(rows))


def _row(r: MethodResult, total_parameters: int, marked: bool) -> tuple[str, ...]:
    share = 100 * r.trainable_parameters / total_parameters
    peak = None if r.peak_bytes is None else r.peak_bytes / 2**20
    return (
        display_name(r.name) + " (incomplete)" * (marked and not r.complete),
        _number(r.learning_rate, "g"),
        percent(r.exact_match),
        _number(mean(r.field_f1), ".2f"),
        _number(r.loss, ".3f"),
        f"{r.trainable_parameters:,}",
        f"{share:.2g} %" if share < 99.5 else "100 %",
        size(r.adapter_bytes),
        _number(peak, ",.0f", " MiB"),
        _number(r.seconds, ".0f", " s") if r.learning_rate else NONE,
        percent([] if r.general_after is None else [r.general_after]),
    )


def readme_section(
    results: Iterable[MethodResult], *, lesson: str, threads: int = 1
) -> str:
    """Make the README's section on the sweep; empty while a method is incomplete.

    Args:
        results: of `recorded_methods`.
        lesson: the path of lesson 8's notebook.
        threads: of the processor that the recorded runs had.
    """
    results = list(results)
    trained = [r for r in results if r.learning_rate]
    if len(trained) < 2 or not all(r.complete for r in results):
        return ""
    steps, batch = BUDGET["steps"], BUDGET["batch_size"]
    on = "one processor thread" if threads == 1 else f"{threads} processor threads"
    return f"""## Methods compared

Each method at its own best learning rate, with {steps} steps of {batch} examples and \
{len(SEEDS)} seeds, scored on {BUDGET["test_examples"]} test sentences: the mean, and \
in brackets the least and the greatest. The prompts were asked once.

{methods_table(results)._repr_markdown_()}

*File* is what has to be kept for each task, *peak* the most that tensors took in one \
step, *training* its seconds on {on}; *general questions* is the \
share still answered.
[Lesson 8]({lesson}) shows how it was measured, and how much of the order is noise.
"""


# --- the order ---

# Of these the least is best.
_LOWER = {"eval_loss", "early_loss", "seconds", "peak_bytes", "adapter_bytes"}


def _values(result: MethodResult, score: str) -> tuple[float, ...]:
    value = getattr(result, score)
    return value if isinstance(value, tuple) else () if value is None else (value,)


def agreement(
    mine: Mapping[str, float],
    results: Iterable[MethodResult],
    *,
    score: str = "eval_loss",
) -> str:
    """Say whether the reader's methods stand in the recorded order.

    Args:
        mine: {name of a method: the reader's value}; a value that is not finite is
            the worst.
        results: of `recorded_methods`; means over their seeds make the order.
        score: the attribute compared, such as `"eval_loss"` or `"exact_match"`.

    Returns:
        One or two sentences: that they agree, or which pairs changed places and
        whether the recorded seeds of each pair overlap.

    >>> recorded = [
    ...     MethodResult("LoRA", "lora", eval_loss=(0.30, 0.34)),
    ...     MethodResult("full", "full", eval_loss=(0.33, 0.37)),
    ... ]
    >>> agreement({"LoRA": 0.5, "full": 0.6}, recorded)
    'Your order is the recorded one: LoRA, then full fine-tuning.'
    >>> agreement({"LoRA": 0.6, "full": 0.5}, recorded)  # doctest: +ELLIPSIS
    'Your order is not the recorded one: LoRA and full fine-tuning changed places...
    """
    known = {r.name: _values(r, score) for r in results}
    names = [name for name in mine if known.get(name)]
    if len(names) < 2:
        return "Nothing to compare yet: fewer than two of your methods are recorded."
    sign = 1 if score in _LOWER else -1

    def own(name: str) -> float:
        value = float(mine[name])
        return sign * value if math.isfinite(value) else math.inf

    def recorded(name: str) -> float:
        return sign * math.fsum(known[name]) / len(known[name])

    names.sort(key=recorded)
    swapped = [
        (first, second)
        for first, second in itertools.combinations(names, 2)
        if recorded(first) != recorded(second) and own(first) > own(second)
    ]
    if not swapped:
        order = ", then ".join(map(display_name, names))
        return f"Your order is the recorded one: {order}."
    reasons = _reasons(swapped, known)
    return (
        f"Your order is not the recorded one: {'; '.join(map(_pair, swapped))} changed "
        f"places. {reasons[0].upper()}{reasons[1:]}."
    )


def _pair(names: tuple[str, str]) -> str:
    return " and ".join(map(display_name, names))


def _reasons(
    swapped: Sequence[tuple[str, str]], known: Mapping[str, tuple[float, ...]]
) -> str:
    """Of pairs that changed places: is it noise of the seeds, or a difference?"""
    noise, single, clear = [], [], []
    for pair in swapped:
        a, b = (known[name] for name in pair)
        if min(len(a), len(b)) < 2:
            single.append(_pair(pair))
        elif max(min(a), min(b)) <= min(max(a), max(b)):
            noise.append(_pair(pair))
        else:
            clear.append(_pair(pair))
    seeds = "those" if noise else "the recorded seeds"
    sentences = [
        (noise, "the recorded seeds of {} overlap, so that their order is noise"),
        (
            clear,
            f"{seeds} of {{}} do not overlap: a shorter run, or other settings, made "
            "it",
        ),
        (single, "of {} too few seeds are recorded to tell noise from a difference"),
    ]
    return "; ".join(
        text.format("; ".join(pairs)) for pairs, text in sentences if pairs
    )
