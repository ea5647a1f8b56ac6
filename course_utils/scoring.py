"""Score answers that are JSON objects: exact match, field F1, both by slice.

Each function takes what the model answered and the right answers, in the same order,
and raises a ValueError where their lengths differ, there is nothing to score, or a
reference is not a JSON object.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from course_utils.data_files import STRICT_JSON


def parse_json_object(text: str) -> dict[str, Any] | None:
    """Read `text` as exactly one JSON object, or return None.

    White space around the object is allowed; anything else around it is not, nor is
    a key that occurs twice, nor `NaN` or `Infinity`, which JSON does not have.

    >>> parse_json_object('Sure! {"action": "none"}') is None
    True
    """
    try:
        value = STRICT_JSON.decode(text.strip())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def matches(predictions: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Say for each prediction whether it equals its reference as JSON.

    Numbers are compared by value (40 equals 40.0), the order of keys does not
    matter, the order of list items does, and `true` is not 1. A prediction that is
    not one JSON object is wrong.
    """
    # None, for what is not an object, equals no reference.
    return [given == right for given, right in _parsed(predictions, references)]


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions that equal their reference as JSON, 0 to 1.

    >>> exact_match(['{"a": 1}', "a = 1"], ['{"a": 1.0}', '{"a": 1}'])
    0.5
    """
    right = matches(predictions, references)
    return sum(right) / len(right)


def exact_text(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of free answers that equal the reference but for white space, 0 to 1.

    >>> exact_text([" yes\\n", "No"], ["yes", "no"])
    0.5
    """
    if not references:
        raise ValueError("nothing to score: there are no references")
    pairs = list(zip(predictions, references, strict=True))
    return sum(a.split() == b.split() for a, b in pairs) / len(pairs)


def field_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Micro F1 over the fields of all answers, 0 to 1; 1 where there is no field.

    Fields are pairs such as `(("actions", 0, "room"), "kitchen")`, and
    F1 = 2 hits / (fields predicted + fields in the references), summed over all
    answers. A prediction that is not one JSON object has no fields.

    >>> field_f1(['{"a": 1, "b": 2}'], ['{"a": 1, "b": 3}'])
    0.5
    """
    hits = stated = 0
    for given, right in _parsed(predictions, references):
        predicted = given or {}
        hits += len(predicted.items() & right.items())
        stated += len(predicted) + len(right)
    return 2 * hits / stated if stated else 1.0


def by_slice(
    predictions: Sequence[str],
    references: Sequence[str],
    slices: Sequence[str],
    score: Callable[[Sequence[str], Sequence[str]], float] = exact_match,
) -> dict[str, float]:
    """Score each slice of the data alone, in the order in which they first occur.

    >>> by_slice(['{"a": 1}', "?"], ['{"a": 1}', '{"a": 2}'], ["easy", "hard"])
    {'easy': 1.0, 'hard': 0.0}
    """
    if not len(predictions) == len(references) == len(slices):
        lengths = f"{len(predictions)} predictions, {len(references)} references"
        raise ValueError(f"{lengths} and {len(slices)} slices")
    pairs: dict[str, list] = {name: [] for name in slices}
    for *pair, name in zip(predictions, references, slices, strict=True):
        pairs[name].append(pair)
    return {name: score(*zip(*rows, strict=True)) for name, rows in pairs.items()}


def by_kind(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Score commands, and what is none (`{"action": "none"}`), apart; {} if one lacks.

    >>> by_kind(['{"action": "none"}'] * 2, ['{"action": "none"}', '{"action": "go"}'])
    {'nothing to do': 1.0, 'commands': 0.0}
    """
    nothing = [_answer(text) == {("action",): '"none"'} for text in references]
    kinds = ["nothing to do" if none else "commands" for none in nothing]
    return by_slice(predictions, references, kinds) if len(set(kinds)) > 1 else {}


def standard_error(share: float, count: int) -> float:
    """How far luck moves a share of `count` answers: sqrt(p (1 - p) / n).

    One right and one wrong answer are added first, so that 0 of 24 is not certain.

    >>> f"{standard_error(3 / 36, 36):.3f} {standard_error(0, 24):.3f}"
    '0.050 0.038'
    """
    p = (share * count + 1) / (count + 2)
    return math.sqrt(p * (1 - p) / (count + 2))


def by_field(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Share of the references' fields that the predictions have, by a field's name.

    A field within others has its own key alone as its name, `room` in
    `{"actions": [{"room": "hall"}]}`; the commonest comes first.

    >>> by_field(['{"a": 1, "b": 2}', "?"], ['{"a": 1, "b": 3}', '{"a": 1}'])
    {'a': 0.5, 'b': 0.0}
    """
    hits, stated = Counter(), Counter()
    for given, right in _parsed(predictions, references):
        for path, value in right.items():
            name = [key for key in path if isinstance(key, str)][-1]
            stated[name] += 1
            hits[name] += (given or {}).get(path) == value
    return {name: hits[name] / count for name, count in stated.most_common()}


def _parsed(
    predictions: Sequence[str], references: Sequence[str]
) -> list[tuple[dict[tuple, Any] | None, dict[tuple, Any]]]:
    if isinstance(predictions, str) or isinstance(references, str):
        raise TypeError("predictions and references are lists of strings, not a string")
    if len(predictions) != len(references):
        lengths = f"{len(predictions)} predictions for {len(references)} references"
        raise ValueError(lengths)
    if not references:
        raise ValueError("nothing to score: there are no references")
    rights = [_answer(text) for text in references]
    if None in rights:
        row = rights.index(None)
        raise ValueError(f"reference {row} is not a JSON object: {references[row]!r}")
    return list(zip(map(_answer, predictions), rights, strict=True))


def _answer(text: str) -> dict[tuple, Any] | None:
    """The fields of a JSON object; None for what is none, or is nested too deeply."""
    try:
        value = parse_json_object(text)
        return None if value is None else _fields(value)
    except RecursionError:
        return None


def _fields(value: Any, path: tuple[str | int, ...] = ()) -> dict[tuple, Any]:
    """The values of a JSON value by path, as {("actions", 0, "level"): 3}.

    A path holds keys and places in lists. Empty objects and lists are values, but an
    answer that is {} has none. Objects are the same JSON where their fields are equal.
    """
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        parts = [_fields(item, (*path, key)) for key, item in items]
        return {path: value for part in parts for path, value in part.items()}
    # As JSON text `true` is not 1; numbers stay numbers: 40 equals 40.0.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {path: value if is_number else json.dumps(value)} if path else {}
