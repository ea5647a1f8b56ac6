"""The table that compares methods. `method_results` offers it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from course_utils.experiment_lists_08 import BUDGET, SEEDS
from course_utils.method_runs import MethodResult
from course_utils.plotting.style import display_name

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
        "method",
        "best rate",
        "exact match",
        "field F1",
        "validation loss",
        "trained parameters",
        "share",
        "file",
        "peak",
        "training",
        general,
    )
    rows = []
    for r in results:
        f1 = sum(r.field_f1) / len(r.field_f1) if r.field_f1 else None
        share = 100 * r.trainable_parameters / total_parameters
        peak = None if r.peak_bytes is None else r.peak_bytes / 2**20
        rows.append(
            (
                display_name(r.name) + " (incomplete)" * (marked and not r.complete),
                _number(r.learning_rate, "g"),
                percent(r.exact_match),
                _number(f1, ".2f"),
                _number(r.loss, ".3f"),
                f"{r.trainable_parameters:,}",
                f"{share:.2g} %" if share < 99.5 else "100 %",
                size(r.adapter_bytes),
                _number(peak, ",.0f", " MiB"),
                _number(r.seconds, ".0f", " s") if r.learning_rate else NONE,
                percent([] if r.general_after is None else [r.general_after]),
            )
        )
    return MethodsTable(head, tuple(rows))


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
