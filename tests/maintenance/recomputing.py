"""Compare a record with what its own runs give."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from maintenance.store import recompute


def differences(record: Mapping[str, Any]) -> list[str]:
    """Say where a record differs from what its own data give; empty if nowhere."""
    stored, computed = (dict(_values(r)) for r in (dict(record), recompute(record)))
    said = []
    for path in dict.fromkeys([*stored, *computed]):
        if path not in stored:
            said.append(f"{path}: not stored")
        elif path not in computed:
            said.append(f"{path}: not computed")
        elif not _same(stored[path], computed[path]):
            said.append(f"{path}: {stored[path]!r} stored, {computed[path]!r} computed")
    return said


def _values(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Each number and text in it, with the keys that lead there."""
    if not value or not isinstance(value, dict | list):
        yield path, value
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _values(item, f"{path}.{key}" if path else str(key))


def _same(stored: Any, computed: Any) -> bool:
    if isinstance(stored, float) and isinstance(computed, int | float):
        return math.isclose(stored, computed, rel_tol=1e-9, abs_tol=1e-12)
    return stored == computed
