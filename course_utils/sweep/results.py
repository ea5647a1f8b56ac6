"""What the sweep of lesson 8 found, and how a reader's own runs compare with it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from course_utils import records
from course_utils.data import load_examples
from course_utils.evaluation import free_text
from course_utils.models import load_model
from course_utils.parameters import count_parameters
from course_utils.plotting.style import display_name, method_of
from course_utils.records import Table
from course_utils.sweep.experiment import (
    SEEDS,
    best_of,
    plan,
    run_experiment,
    split_sizes,
)

FAMILIES = ("08_low_rank", "08_others")
SPEED = "08_speed"  # a few steps of each method, nothing else on the machine
BUILTIN_PARAMETERS = 134_515_008
NONE = "–"
OWN_BATCH = 4  # examples in a step of `compare_on`

# {learning rate: (final validation loss, exact match, field F1)}
Rates = dict[float, tuple[float | None, float | None, float | None]]


@dataclass(frozen=True)
class MethodResult:
    """One method at the learning rate of its lowest validation loss.

    Shares are 0 to 1. Tuples have one value a seed, the first seed first; they are
    empty, and single values None, where nothing was measured.
    """

    name: str  # as the record calls it, without the rate
    method: str  # its key in `plotting.style`, or the name where it has none
    learning_rate: float | None = None  # best of the first seed; None if untrained
    rates: Rates = field(default_factory=dict)  # of the first seed
    exact_match: tuple[float, ...] = ()
    field_f1: tuple[float, ...] = ()
    eval_loss: tuple[float, ...] = ()  # nats a token
    by_slice: dict[str, float] = field(default_factory=dict)
    by_field: dict[str, float] = field(default_factory=dict)
    trainable_parameters: int = 0
    adapter_bytes: float | None = None  # to be kept for each task
    peak_bytes: int | None = None  # the most that tensors took in one step
    seconds: float | None = None  # of the training alone, as `08_speed` timed its steps
    general_before: float | None = None  # share of general questions answered
    general_after: float | None = None
    complete: bool = False  # the best rate is inside its grid, and no seed diverged
    record: str = ""

    @property
    def score(self) -> float | None:
        """Mean exact match, 0 to 1."""
        return _mean(self.exact_match)

    @property
    def loss(self) -> float | None:
        """Mean final validation loss, nats a token."""
        return _mean(self.eval_loss)


def _known(values: Iterable[float | None]) -> tuple[float, ...]:
    return tuple(v for v in values if v is not None and math.isfinite(v))


def _mean(values: Iterable[float | None]) -> float | None:
    """The mean of what is there; None of nothing.

    >>> _mean([1.0, None, 2.0]), _mean([])
    (1.5, None)
    """
    known = _known(values)
    return math.fsum(known) / len(known) if known else None


def split_label(run: Mapping) -> tuple[str, float | None]:
    """Name and learning rate of a run that was made at several rates.

    >>> split_label({"label": "LoRA lr 0.01"}), split_label({"label": "full"})
    (('LoRA', 0.01), ('full', None))
    """
    name, separator, rate = run["label"].rpartition(" lr ")
    return (name, float(rate)) if separator else (rate, None)


def _means(dicts: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for shares in dicts for name in shares)
    return {name: _mean(shares.get(name) for shares in dicts) for name in names}


def _exact(run: dict) -> float | None:
    metrics = run["metrics"]
    return metrics.get("exact_match", metrics.get("exact_text"))


def _final(run: dict) -> float | None:
    """Validation loss at the end; None where it is not a number."""
    return run["eval_loss"][-1][1] if run.get("eval_loss") else None


def _result_of(name: str, runs: Sequence[dict]) -> MethodResult:
    """Read one method's result from its runs, at one rate or several."""
    runs = sorted(runs, key=lambda run: run["seed"])
    best, chosen, inside = None, runs, True
    first = {r["settings"]["learning_rate"]: r for r in reversed(runs) if r["loss"]}
    rates = {
        rate: (_final(run), _exact(run), run["metrics"].get("field_f1"))
        for rate, run in sorted(first.items())
    }
    if rates:
        best = best_of({rate: values[0] for rate, values in rates.items()})
        chosen = [r for r in runs if r["settings"]["learning_rate"] == best]
        inside = min(rates) < best < max(rates)
    all_seeds = {run["seed"] for run in chosen} >= set(SEEDS)
    losses = [_final(run) for run in chosen]
    metrics = [run["metrics"] for run in chosen]
    measured = [run.get("measured", {}) for run in chosen]
    here = [m for m, run in zip(measured, chosen, strict=True) if "machine" not in run]
    costs = here or measured  # of the record's own machine, where it made a run
    general = [m["general_questions"] for m in measured if "general_questions" in m]
    return MethodResult(
        name=name,
        method=method_of(name) or name,
        learning_rate=best,
        rates=rates,
        exact_match=_known(map(_exact, chosen)),
        field_f1=_known(m.get("field_f1") for m in metrics),
        eval_loss=_known(losses),
        by_slice=_means([m.get("by_slice") or {} for m in metrics]),
        by_field=_means([m.get("by_field") or {} for m in metrics]),
        trainable_parameters=chosen[0].get("trainable_parameters", 0),
        general_before=_mean(g["before"]["answer_share"] for g in general),
        general_after=_mean(g["after"]["answer_share"] for g in general),
        complete=not best or (inside and all_seeds and None not in losses),
        adapter_bytes=_mean(c.get("adapter_bytes") for c in costs) if best else 0,
        peak_bytes=costs[0].get("peak_bytes"),  # other seeds: other batches
        seconds=_mean(c.get("train_seconds") for c in costs) if best else 0.0,
    )


def _runs(record: str) -> list[dict]:
    """The runs of a record; none where it is missing."""
    missing = record not in records.list_records()
    return [] if missing else records.load_record(record)["runs"]


def recorded_methods() -> list[MethodResult]:
    """Read every method that the sweep has begun, untrained ones included.

    Their order is that of the records; a record that is not there is left out.
    """
    groups: dict[tuple[str, str], list[dict]] = {}
    for record in FAMILIES:
        for run in _runs(record):
            groups.setdefault((record, split_label(run)[0]), []).append(run)
    step_seconds: dict[str, list[float]] = {}
    for run in _runs(SPEED):
        seconds = run["measured"]["train_seconds"] / run["settings"]["steps"]
        step_seconds.setdefault(run["label"], []).append(seconds)
    results = []
    for (record, name), runs in groups.items():
        result = replace(_result_of(name, runs), record=record)
        if timed := _mean(step_seconds.get(name, [])):
            result = replace(result, seconds=timed * runs[0]["settings"]["steps"])
        results.append(result)
    return results


def _percent(values: Sequence[float]) -> str:
    """A share in per cent; of several, their mean, smallest and largest.

    >>> _percent([0.25]), _percent([0.2, 0.3, 0.4]), _percent([])
    ('25 %', '30 % (20–40)', '–')
    """
    if not values:
        return NONE
    middle = f"{100 * sum(values) / len(values):.0f} %"
    if len(values) == 1:
        return middle
    return f"{middle} ({100 * min(values):.0f}–{100 * max(values):.0f})"


def _size(count: float | None) -> str:
    """Bytes, in the unit that keeps them short.

    >>> _size(46_080), _size(9_800_000), _size(0), _size(None)
    ('46 kB', '9.8 MB', '0', '–')
    """
    if not count:
        return NONE if count is None else "0"
    unit, divisor = ("MB", 1e6) if count >= 999_500 else ("kB", 1e3)
    value = count / divisor
    return f"{value:.0f} {unit}" if value >= 99.5 or unit == "kB" else f"{value:.2g} MB"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return NONE if value is None else f"{value:{form}}{unit}"


def _order(results: Iterable[MethodResult]) -> list[MethodResult]:
    """Best first: by exact match, then by the lower validation loss, then by name."""

    def key(r: MethodResult) -> tuple:
        return r.score is None, -(r.score or 0), r.loss is None, r.loss or 0, r.name

    return sorted(results, key=key)


def methods_table(
    results: Iterable[MethodResult],
    *,
    total_parameters: int = BUILTIN_PARAMETERS,
    marked: bool = True,
    caption: str = "",
) -> Table:
    """Compare methods in one table, the best score first.

    Columns are as in `MethodResult`; `total_parameters` are the model's, and `marked`
    says of a method that its sweep is incomplete.
    """
    results = _order(results)
    before = {round(100 * r.general_before) for r in results if r.general_before}
    general = "general questions"
    if len(before) == 1:
        general += f" (before: {before.pop()} %)"
    head = (
        *("method", "best rate", "exact match", "field F1", "validation loss"),
        *("trained parameters", "share", "file", "peak", "training", general),
    )
    rows = tuple(_row(r, total_parameters, marked) for r in results)
    return Table(head, rows, caption)


def _row(r: MethodResult, total_parameters: int, marked: bool) -> tuple[str, ...]:
    share = 100 * r.trainable_parameters / total_parameters
    peak = None if r.peak_bytes is None else r.peak_bytes / 2**20
    return (
        display_name(r.name) + " (incomplete)" * (marked and not r.complete),
        _number(r.learning_rate, "g"),
        _percent(r.exact_match),
        _number(_mean(r.field_f1), ".2f"),
        _number(r.loss, ".3f"),
        f"{r.trainable_parameters:,}",
        f"{share:.2g} %" if share < 99.5 else "100 %",
        _size(r.adapter_bytes),
        _number(peak, ",.0f", " MiB"),
        _number(r.seconds, ".0f", " s") if r.learning_rate else NONE,
        _percent([] if r.general_after is None else [r.general_after]),
    )


def agreement(mine: Mapping[str, float], results: Iterable[MethodResult]) -> str:
    """Say whether the reader's methods stand in the recorded order of their losses.

    If not, which pairs changed places, and whether their recorded seeds overlap. `mine`
    are {name of a method: validation loss}, where one that is not finite is the worst;
    means over the seeds of `recorded_methods` make the recorded order.
    """
    seeds = {r.name: r.eval_loss for r in results}
    names = [name for name in mine if seeds.get(name)]
    if len(names) < 2:
        return "Nothing to compare yet: fewer than two of your methods are recorded."
    recorded = {name: _mean(seeds[name]) for name in names}
    own = {n: mine[n] if math.isfinite(mine[n]) else math.inf for n in names}
    names.sort(key=recorded.get)
    swapped = [
        (first, second)
        for first, second in itertools.combinations(names, 2)
        if recorded[first] != recorded[second] and own[first] > own[second]
    ]
    if not swapped:
        order = ", then ".join(map(display_name, names))
        return f"Your order is the recorded one: {order}."
    pairs = "; ".join(
        f"{display_name(a)} and {display_name(b)} ({_seeds_say(seeds[a], seeds[b])})"
        for a, b in swapped
    )
    return f"Your order is not the recorded one. These changed places: {pairs}."


def _seeds_say(a: tuple[float, ...], b: tuple[float, ...]) -> str:
    """Do the recorded losses of two methods tell a difference from noise?"""
    if min(len(a), len(b)) < 2:
        return "too few recorded seeds to tell noise from a difference"
    if max(min(a), min(b)) <= min(max(a), max(b)):
        return "their recorded seeds overlap: noise"
    return "their recorded seeds do not overlap: a shorter run, or other settings"


@dataclass(frozen=True, repr=False)
class OwnComparison(Table):
    """Methods compared on the reader's data; a notebook shows it as a table."""

    results: tuple[MethodResult, ...] = ()  # in the order asked for
    runs: tuple[dict[str, Any], ...] = ()  # of `run_experiment`: losses, answers, ...


def compare_on(
    data: str | Path,
    *,
    model: str | None = None,
    methods: Sequence[str] = ("LoRA", "full"),
    steps: int = 20,
    eval_examples: int = 24,
    test_examples: int = 24,
    rates: Mapping[str, float] | None = None,
    template: str | None = None,
) -> OwnComparison:
    """Train and compare methods on other data, with another model.

    Each method runs as in the sweep, once, with steps of `OWN_BATCH` examples, at its
    best recorded learning rate. Where no test completion is a JSON object, answers are
    compared as text.

    Args:
        data: as for `load_examples`.
        model: a hub name or a folder; None takes the course's.
        methods: names as in the sweep, such as `"PiSSA"`, or `ZERO_SHOT`, which asks
            the untrained model; case does not matter.
        rates: {name of a method: learning rate} where the recorded one will not do.
        template: None takes the tokenizer's own, "plain" where it has none.

    Raises DataError: the data cannot be used, or there are too few examples;
    ValueError: a method is unknown; says the known ones.
    """
    data = str(data)
    recorded = {r.name: r.learning_rate for r in recorded_methods() if r.learning_rate}
    experiments = plan(
        data,
        methods,
        recorded | dict(rates or {}),
        steps=steps,
        batch_size=OWN_BATCH,
        eval_examples=eval_examples,
        test_examples=test_examples,
        base_dtype="float32",
        costs=True,
        model=model,
        template=template,
    )
    if not experiments:
        raise ValueError("no method is named")
    sizes = split_sizes(data, OWN_BATCH)
    counts = ", ".join(f"{n:,} {split}" for split, n in sizes.items())
    print(f"{data}: {counts} examples")
    runs = {}
    for name, experiment in experiments.items():
        print(f"{experiment.label}: {experiment.steps} steps of {OWN_BATCH}", end="")
        runs[name] = run_experiment(experiment, progress=False)
        print(f" · {runs[name]['seconds']:.0f} s")
    results = {name: _result_of(name, [run]) for name, run in runs.items()}
    if "full" in results:
        total = results["full"].trainable_parameters
    else:
        total = count_parameters(load_model(model)).total
    as_text = free_text(load_examples(data, "test")["completion"])
    answered = len(next(iter(runs.values())).get("references", []))
    table = methods_table(
        results.values(),
        total_parameters=total,
        marked=False,
        caption=f"Examples: {counts}. Exact match is the reference's "
        f"{'text' if as_text else 'JSON'}, on {answered} test examples; one seed, so "
        "small differences are noise.",
    )
    found, made = tuple(results.values()), tuple(runs.values())
    return OwnComparison(table.head, table.rows, table.caption, found, made)
