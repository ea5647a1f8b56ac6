"""Score answers that are JSON objects: exact match, field F1, both by slice.

Each function takes what the model answered and the right answers, in the same order,
and raises a ValueError where their lengths differ, there is nothing to score, or a
reference is not a JSON object. Lessons and recorded runs are scored by the same ones.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any


def parse_json_object(text: str) -> dict[str, Any] | None:
    """Read `text` as exactly one JSON object, or return None.

    White space around the object is allowed; anything else around it is not, nor is
    a key that occurs twice, nor `NaN` or `Infinity`, which JSON does not have.

    >>> parse_json_object('Sure! {"action": "none"}') is None
    True
    """
    hooks = {"object_pairs_hook": _without_duplicates, "parse_constant": _no_constant}
    try:
        value = json.loads(text.strip(), **hooks)
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
    return [_same_json(*answers) for answers in _parsed(predictions, references)]


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

    Fields are (path, value) pairs such as `("actions[0].room", "kitchen")`, and
    F1 = 2 hits / (fields predicted + fields in the references), summed over all
    answers. A prediction that is not one JSON object has no fields.

    >>> field_f1(['{"a": 1, "b": 2}'], ['{"a": 1, "b": 3}'])
    0.5
    """
    hits = stated = 0
    for answers in _parsed(predictions, references):
        predicted, right = map(_fields, answers)
        hits += (predicted & right).total()
        stated += predicted.total() + right.total()
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


def by_field(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Share of the references' fields that the predictions have, by a field's name.

    `actions[0].room` and `room` are both the field `room`; the commonest comes first.

    >>> by_field(['{"a": 1, "b": 2}', "?"], ['{"a": 1, "b": 3}', '{"a": 1}'])
    {'a': 0.5, 'b': 0.0}
    """
    hits, stated = Counter(), Counter()
    for answers in _parsed(predictions, references):
        predicted, right = map(_fields, answers)
        for counts, fields in ((hits, predicted & right), (stated, right)):
            for (path, _), number in fields.items():
                counts[path.rpartition(".")[2].partition("[")[0]] += number
    return {name: hits[name] / count for name, count in stated.most_common()}


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _same_json(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b  # Python's True equals 1
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_json(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_same_json, a, b))
    return a == b


def _parsed(
    predictions: Sequence[str], references: Sequence[str]
) -> list[tuple[dict[str, Any] | None, dict[str, Any]]]:
    if isinstance(predictions, str) or isinstance(references, str):
        raise TypeError("predictions and references are lists of strings, not a string")
    if len(predictions) != len(references):
        lengths = f"{len(predictions)} predictions for {len(references)} references"
        raise ValueError(lengths)
    if not references:
        raise ValueError("nothing to score: there are no references")
    rights = [parse_json_object(text) for text in references]
    if None in rights:
        row = rights.index(None)
        raise ValueError(f"reference {row} is not a JSON object: {references[row]!r}")
    return list(zip(map(parse_json_object, predictions), rights, strict=True))


def _fields(answer: dict[str, Any] | None) -> Counter:
    """Count the fields of an answer by (path, value); {} and None have none."""
    fields = Counter()
    for path, value in _flatten(answer) if answer else ():
        # As JSON text `true` is not 1; numbers stay numbers: 40 equals 40.0.
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fields[path, value if is_number else json.dumps(value)] += 1
    return fields


def _flatten(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """List pairs as ('actions[0].level', 3) of a JSON value; empty ones are values."""
    if not isinstance(value, dict | list) or not value:
        return [(path, value)]
    if isinstance(value, dict):
        items = [(f"{path}.{key}" if path else key, value[key]) for key in value]
    else:
        items = [(f"{path}[{position}]", item) for position, item in enumerate(value)]
    return [pair for inner, item in items for pair in _flatten(item, inner)]
