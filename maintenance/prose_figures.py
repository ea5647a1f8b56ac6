"""Figures in prose that carry their source, as `93 %<!-- run:03_lora:a.b -->` does.

The comment is invisible where Markdown is shown. A house test finds each marker in the
notebooks and the README and compares the figure with the record.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from course_utils.records import RecordError, lookup

_MARKER = re.compile(r"<!--\s*run:(?P<path>[^>]*?)\s*-->")
_FIGURE = re.compile(
    r"(?P<figure>[-+−]?\d[\d,]*(?:\.\d+)?"
    r"(?:[ \u00a0\u202f]?(?:%|[^\W\d_]+(?:/[a-z]+)?))?)"
    r"[*_`]*$"
)
_PARTS = re.compile(
    r"(?P<sign>[-+−]?)(?P<digits>\d[\d,]*)(?P<rest>\.\d+)?[ \u00a0\u202f]?(?P<unit>.*)"
)
# What one of each unit is in the record: shares are 0 to 1, times seconds, sizes bytes.
UNITS = {
    "%": 0.01,
    "percent": 0.01,
    "points": 0.01,
    "ms": 1e-3,
    "min": 60.0,
    "minutes": 60.0,
    "h": 3600.0,
    "hours": 3600.0,
    "kB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "KiB": 2.0**10,
    "MiB": 2.0**20,
    "GiB": 2.0**30,
    "k": 1e3,
    "M": 1e6,
    "million": 1e6,
    "billion": 1e9,
}


def find_markers(text: str) -> list[tuple[str, str]]:
    """Find each marked figure in a Markdown text.

    Args:
        text: Markdown.

    Returns:
        [(shown text, path)]; the text is empty where no figure stands before a marker.

    Examples:
        >>> find_markers("It scores **93 %**<!-- run:03_lora:exact_match.lora --> now.")
        [('93 %', '03_lora:exact_match.lora')]
    """
    found = []
    for marker in _MARKER.finditer(text):
        figure = _FIGURE.search(text[: marker.start()].rstrip())
        found.append((figure["figure"] if figure else "", marker["path"]))
    return found


def shows(shown: str, value: float, *, percent: bool = False) -> bool:
    """Say whether a printed figure is `value`, rounded as it is printed.

    Args:
        shown: such as `"93 %"`, `"1.7 s"`, `"2.31"`, `"134,515,008"`, `"270 MB"`. A
            unit that is not in `UNITS` counts as one.
        value: share, seconds, bytes or a plain number.
        percent: the value itself is in per cent.

    Examples:
        >>> shows("93 %", 0.9312), shows("93 %", 0.936), shows("134 MB", 134217728)
        (True, False, True)
    """
    parts = _PARTS.fullmatch(shown.strip())
    if parts is None or not _grouped(parts["digits"]) or not math.isfinite(value):
        return False
    unit = 1.0 if percent else UNITS.get(parts["unit"], 1.0)
    rest = parts["rest"] or ""
    number = float(parts["digits"].replace(",", "") + rest)
    number = -number if parts["sign"] in ("-", "−") else number
    exact = value / unit
    last = 10.0 ** -max(len(rest) - 1, 0)
    # half a unit of the last digit, and the rounding of the division itself
    return abs(exact - number) <= last / 2 + 1e-12 * abs(exact)


def _grouped(digits: str) -> bool:
    return "," not in digits or re.fullmatch(r"\d{1,3}(,\d{3})+", digits) is not None


def check_marker(
    shown: str, path: str, find: Callable[[str], Any] = lookup
) -> str | None:
    """Compare a marked figure with its record.

    Args:
        shown: the figure as printed.
        path: the marker's path.
        find: gives the value of a path.

    Returns:
        None where they agree, otherwise a sentence that says what differs.
    """
    if not shown:
        return f"run:{path}: no figure stands before the marker"
    try:
        value = find(path)
    except RecordError as error:
        return f"{shown}: {error}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{shown}: {path} is {value!r}, not a number"
    if not shows(shown, value, percent=path.endswith("_percent")):
        return f"{shown}: {path} is {value:.6g}"
    return None


def check_text(text: str, find: Callable[[str], Any] = lookup) -> list[str]:
    """Check every marked figure of a text.

    Args:
        text: Markdown.
        find: gives the value of a path.

    Returns:
        Sentences about the figures that are wrong; empty if none is.
    """
    checked = [check_marker(shown, path, find) for shown, path in find_markers(text)]
    return [sentence for sentence in checked if sentence]
