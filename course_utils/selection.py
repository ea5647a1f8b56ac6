"""Which records of a data set to measure on, and their columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def stratified(
    dataset: Iterable[Mapping[str, Any]], limit: int | None = None
) -> list[Mapping[str, Any]]:
    """Take `limit` records, each slice in its share, spread evenly over the data.

    The choice depends on the data alone. Places are shared out by largest remainder,
    and each slice gets at least one where `limit` allows it.

    Raises:
        ValueError: the data set is empty, or `limit` is below 1.

    >>> rows = [{"n": i, "slice": "hard" if i % 4 == 0 else "easy"} for i in range(12)]
    >>> [row["n"] for row in stratified(rows, 4)]
    [2, 4, 6, 10]
    """
    records = list(dataset)
    if not records:
        raise ValueError("the data set is empty")
    if limit is None:
        return records
    if limit < 1:
        raise ValueError(f"limit must be 1 or more, not {limit}")
    if limit >= len(records):
        return records
    groups: dict[Any, list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault(record.get("slice"), []).append(i)
    least = 1 if limit >= len(groups) else 0
    exact = {name: limit * len(g) / len(records) for name, g in groups.items()}
    places = {name: max(least, int(share)) for name, share in exact.items()}
    while (spare := limit - sum(places.values())) != 0:
        step = 1 if spare > 0 else -1
        able = [n for n in groups if step > 0 or places[n] > least]
        name = max(able, key=lambda n: step * (exact[n] - places[n]))
        places[name] += step
    chosen = []
    for name, group in groups.items():
        k = places[name]
        chosen += [group[(2 * i + 1) * len(group) // (2 * k)] for i in range(k)]
    return [records[i] for i in sorted(chosen)]


def column(records: Sequence[Mapping[str, Any]], name: str) -> tuple[str, ...]:
    """The strings of one column; a ValueError names the record that has none."""
    for i, record in enumerate(records):
        if not isinstance(record.get(name), str):
            found = type(record.get(name)).__name__
            raise ValueError(f"record {i}: {name!r} must be a string, found {found}")
    return tuple(record[name] for record in records)
