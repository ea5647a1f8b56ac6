"""Score answers that are JSON objects: exact match, field F1, both by slice.

Plain Python on lists of strings: no model, no library. Lessons, `evaluation` and the
recorded runs score with these functions, so a figure in the course and a figure in a
record are one computation. Each takes what the model answered and the right answers,
in the same order; each raises a ValueError where their lengths differ, there is
nothing to score, or a reference is not a JSON object.
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

    >>> parse_json_object(' {"action": "none"} ')
    {'action': 'none'}
    >>> parse_json_object('Sure! {"action": "none"}') is None
    True
    """
    try:
        value = json.loads(
            text.strip(),
            object_pairs_hook=_without_duplicates,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def matches(predictions: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Say for each prediction whether it equals its reference as JSON.

    Numbers are compared by value (40 equals 40.0), the order of keys does not
    matter, the order of list items does, and `true` is not 1. A prediction that is
    not one JSON object is wrong.
    """
    return [
        predicted is not None and _same_json(predicted, right)
        for predicted, right in _parsed(predictions, references)
    ]


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions that equal their reference as `matches` says, 0 to 1.

    >>> exact_match(['{"a": 1}', "a = 1"], ['{"a": 1.0}', '{"a": 1}'])
    0.5
    """
    right = matches(predictions, references)
    return sum(right) / len(right)


def exact_text(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions equal to the reference as text, 0 to 1; for free answers.

    White space counts as one blank, and none at the ends.

    >>> exact_text([" yes\\n", "No"], ["yes", "no"])
    0.5
    """
    if not references:
        raise ValueError("nothing to score: there are no references")
    pairs = list(zip(predictions, references, strict=True))
    return sum(a.split() == b.split() for a, b in pairs) / len(pairs)


def field_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Micro F1 over the fields of all answers, 0 to 1; 1 where there is no field.

    Each answer is flattened into (path, value) pairs, such as
    `("actions[0].room", "kitchen")`. With `hits` the pairs that prediction and
    reference share, summed over all answers,
    F1 = 2 hits / (pairs predicted + pairs in the references). A prediction that is
    not one JSON object states no pair, so all of its reference's pairs are missed.

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
        raise ValueError(
            f"{len(predictions)} predictions, {len(references)} references and "
            f"{len(slices)} slices"
        )
    return {
        name: score(
            [p for p, s in zip(predictions, slices, strict=True) if s == name],
            [r for r, s in zip(references, slices, strict=True) if s == name],
        )
        for name in dict.fromkeys(slices)
    }


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
            for (path, *_), number in fields.items():
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
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references"
        )
    if not references:
        raise ValueError("nothing to score: there are no references")
    rights = [parse_json_object(text) for text in references]
    if None in rights:
        row = rights.index(None)
        raise ValueError(f"reference {row} is not a JSON object: {references[row]!r}")
    return list(zip(map(parse_json_object, predictions), rights, strict=True))


def _fields(value: dict[str, Any] | None) -> Counter:
    """Count the fields of an answer by path, type and value; {} and None have none."""
    fields = Counter()
    for path, item in _flatten(value) if value else ():
        # The type is in the key, as `true` is not 1 although Python says so; numbers
        # share one type: 40 equals 40.0.
        if isinstance(item, bool) or not isinstance(item, int | float):
            fields[path, type(item).__name__, json.dumps(item)] += 1
        else:
            fields[path, "number", item] += 1
    return fields


def _flatten(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """List the (path, value) pairs of a parsed JSON value.

    List items carry their position. An empty object or list is a value of its own.

    >>> _flatten({"actions": [{"action": "stop"}, {"level": 3}]})
    [('actions[0].action', 'stop'), ('actions[1].level', 3)]
    """
    if isinstance(value, dict) and value:
        items = [
            (f"{path}.{key}" if path else key, item) for key, item in value.items()
        ]
    elif isinstance(value, list) and value:
        items = [(f"{path}[{position}]", item) for position, item in enumerate(value)]
    else:
        return [(path, value)]
    return [pair for inner, item in items for pair in _flatten(item, inner)]
