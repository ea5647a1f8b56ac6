"""Score answers that are JSON objects: exact match, field F1, both by slice.

Plain Python on lists of strings: no model, no library. `evaluation` offers these
functions to the lessons and `records` recomputes recorded figures with them, so a
figure in the course and a figure in a record are one computation.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def parse_json_object(text: str) -> dict[str, Any] | None:
    """Read `text` as exactly one JSON object.

    White space around the object is allowed; anything else around it is not, nor is
    a key that occurs twice, nor `NaN` or `Infinity`, which JSON does not have.

    Args:
        text: What the model answered.

    Returns:
        The object, or None where `text` is not one.

    Examples:
        >>> parse_json_object(' {"action": "none"} ')
        {'action': 'none'}
        >>> parse_json_object('Sure! {"action": "none"}') is None
        True
    """
    try:
        value = json.loads(
            text.strip(), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def same_json(a: Any, b: Any) -> bool:
    """Say whether two parsed JSON values are equal.

    Numbers are compared by value (40 equals 40.0), the order of keys does not
    matter, the order of list items does, and `true` is not 1.

    Args:
        a: a parsed JSON value.
        b: another.

    Examples:
        >>> same_json({"n": 40, "on": True}, {"on": True, "n": 40.0})
        True
        >>> same_json({"on": True}, {"on": 1})
        False
    """
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_json, a, b))
    return a == b


def _pairs(
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
    pairs = []
    for position, (guess, truth) in enumerate(
        zip(predictions, references, strict=True)
    ):
        right = parse_json_object(truth)
        if right is None:
            raise ValueError(f"reference {position} is not a JSON object: {truth!r}")
        pairs.append((parse_json_object(guess), right))
    return pairs


def matches(predictions: Sequence[str], references: Sequence[str]) -> list[bool]:
    """Say for each prediction whether it equals its reference as JSON.

    Args:
        predictions: What the model answered.
        references: The right answers, in the same order.

    Raises:
        ValueError: lengths differ, there is nothing to score, or a reference is not
            a JSON object.
    """
    return [
        guess is not None and same_json(guess, right)
        for guess, right in _pairs(predictions, references)
    ]


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions that equal their reference as JSON, 0 to 1.

    Equality is that of `same_json`; a prediction that is not one JSON object is
    wrong.

    Args:
        predictions: What the model answered.
        references: The right answers, in the same order.

    Returns:
        The share, 0 to 1.

    Raises:
        ValueError: lengths differ, there is nothing to score, or a reference is not
            a JSON object.

    Examples:
        >>> exact_match(['{"a": 1}', "a = 1"], ['{"a": 1.0}', '{"a": 1}'])
        0.5
    """
    right = matches(predictions, references)
    return sum(right) / len(right)


def exact_text(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of predictions equal to the reference as text, 0 to 1; for free answers.

    White space in `predictions` and `references` counts as one blank.

    Raises:
        ValueError: lengths differ, or there is nothing to score.

    Examples:
        >>> exact_text([" yes\\n", "No"], ["yes", "no"])
        0.5
    """
    if not references:
        raise ValueError("nothing to score: there are no references")
    pairs = list(zip(predictions, references, strict=True))
    return sum(a.split() == b.split() for a, b in pairs) / len(pairs)


def flatten_fields(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """List the (path, value) pairs of a parsed JSON value.

    List items carry their position. An empty object or list is a value of its own.

    Args:
        value: a parsed JSON value.
        path: what the paths begin with.

    Examples:
        >>> flatten_fields({"actions": [{"action": "stop"}, {"level": 3}]})
        [('actions[0].action', 'stop'), ('actions[1].level', 3)]
    """
    if isinstance(value, dict) and value:
        return [
            pair
            for key, item in value.items()
            for pair in flatten_fields(item, f"{path}.{key}" if path else str(key))
        ]
    if isinstance(value, list) and value:
        return [
            pair
            for position, item in enumerate(value)
            for pair in flatten_fields(item, f"{path}[{position}]")
        ]
    return [(path, value)]


def _fields(value: dict[str, Any] | None) -> Counter:
    if not value:  # broken, or {}: it states no field
        return Counter()

    # the type stands in the key, as `true` is not 1 although Python says so;
    # numbers share one type: 40 equals 40.0
    def key(item: Any) -> tuple[str, str | float]:
        if isinstance(item, bool) or not isinstance(item, int | float):
            return type(item).__name__, json.dumps(item)
        return "number", item

    return Counter((path, *key(item)) for path, item in flatten_fields(value))


def field_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Micro F1 over the fields of all answers, 0 to 1.

    Each answer is flattened into (path, value) pairs, such as
    `("actions[0].room", "kitchen")`. With `hits` the pairs that prediction and
    reference share, summed over all answers,
    F1 = 2 hits / (pairs predicted + pairs in the references). A prediction that is
    not one JSON object states no pair, so all of its reference's pairs are missed.

    Args:
        predictions: What the model answered.
        references: The right answers, in the same order.

    Returns:
        The F1, 0 to 1; 1 where neither side states any field.

    Raises:
        ValueError: lengths differ, there is nothing to score, or a reference is not
            a JSON object.

    Examples:
        >>> field_f1(['{"a": 1, "b": 2}'], ['{"a": 1, "b": 3}'])
        0.5
    """
    hits = stated = 0
    for guess, right in _pairs(predictions, references):
        predicted, wanted = _fields(guess), _fields(right)
        hits += (predicted & wanted).total()
        stated += predicted.total() + wanted.total()
    return 2 * hits / stated if stated else 1.0


def by_slice(
    predictions: Sequence[str],
    references: Sequence[str],
    slices: Sequence[str],
    score: Callable[[Sequence[str], Sequence[str]], float] = exact_match,
) -> dict[str, float]:
    """Score each slice of the data alone.

    Args:
        predictions: What the model answered.
        references: The right answers, in the same order.
        slices: The slice each example belongs to, in the same order.
        score: `exact_match` or `field_f1`.

    Returns:
        {slice: score}, in the order in which the slices first occur.

    Raises:
        ValueError: lengths differ, or what `score` raises.

    Examples:
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

    `actions[0].room` and `room` are both the field `room`.

    Args:
        predictions: What the model answered.
        references: The right answers, in the same order.

    Returns:
        {field: share, 0 to 1}, the commonest field first.

    Raises:
        ValueError: as `field_f1`.

    Examples:
        >>> by_field(['{"a": 1, "b": 2}', "?"], ['{"a": 1, "b": 3}', '{"a": 1}'])
        {'a': 0.5, 'b': 0.0}
    """
    hits, stated = Counter(), Counter()
    for guess, right in _pairs(predictions, references):
        wanted = _fields(right)
        common = _fields(guess) & wanted
        for counts, fields in ((hits, common), (stated, wanted)):
            for (path, *_), number in fields.items():
                counts[path.rpartition(".")[2].partition("[")[0]] += number
    return {name: hits[name] / count for name, count in stated.most_common()}
