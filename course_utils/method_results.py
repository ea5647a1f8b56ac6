"""What the sweep of lesson 08 found, and how a reader's own points compare with it.

`recorded_methods` reads the records, `methods_table` shows them, `agreement` says
whether a reader's order is the recorded one, and `compare_on` makes the comparison on
other data and another model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping

from course_utils.method_compare import OwnComparison, compare_on
from course_utils.method_runs import (
    MethodResult,
    long_runs,
    recorded_methods,
    result_of,
)
from course_utils.method_table import MethodsTable, methods_table
from course_utils.plotting.style import display_name

__all__ = [
    "MethodResult",
    "MethodsTable",
    "OwnComparison",
    "agreement",
    "compare_on",
    "long_runs",
    "methods_table",
    "recorded_methods",
    "result_of",
]

# Of these the least is best.
_LOWER = {"eval_loss", "early_loss", "seconds", "peak_bytes", "adapter_bytes"}


def _values(result: MethodResult, score: str) -> tuple[float, ...]:
    value = getattr(result, score)
    return value if isinstance(value, tuple) else () if value is None else (value,)


def _join(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


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
    swapped, noise, single, clear = [], [], [], []
    for first, second in itertools.combinations(names, 2):
        if recorded(first) == recorded(second) or own(first) <= own(second):
            continue
        pair = f"{display_name(first)} and {display_name(second)}"
        swapped.append(pair)
        a, b = known[first], known[second]
        if min(len(a), len(b)) < 2:
            single.append(pair)
        elif max(min(a), min(b)) <= min(max(a), max(b)):
            noise.append(pair)
        else:
            clear.append(pair)
    if not swapped:
        order = ", then ".join(map(display_name, names))
        return f"Your order is the recorded one: {order}."
    said = [
        (noise, "the recorded seeds of {} overlap, so that their order is noise"),
        (
            clear,
            "those of {} do not overlap: a shorter run, or other settings, made it",
        ),
        (single, "of {} too few seeds are recorded to tell noise from a difference"),
    ]
    parts = [text.format("; ".join(pairs)) for pairs, text in said if pairs]
    if not noise and clear:
        parts[0] = parts[0].replace("those", "the recorded seeds", 1)
    reasons = "; ".join(parts)
    return (
        f"Your order is not the recorded one: {'; '.join(swapped)} changed places. "
        f"{reasons[0].upper()}{reasons[1:]}."
    )
