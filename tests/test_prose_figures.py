"""Figures in prose agree with the records they name."""

import pytest

from course_utils.records import RecordError
from maintenance.prose_figures import check_marker, check_text, find_markers, shows


@pytest.mark.parametrize(
    ("shown", "value", "right"),
    [
        ("93 %", 0.93, True),
        ("93 %", 0.9349, True),
        ("93 %", 0.9351, False),
        ("93.1 %", 0.9312, True),
        ("93%", 0.93, True),
        ("93\u00a0%", 0.93, True),
        ("93", 0.93, False),
        ("0.93", 0.93, True),
        ("1.7 s", 1.74, True),
        ("1.7 s", 1.76, False),
        ("2.31", 2.3149, True),
        ("2.31", 2.32, False),
        ("134,515,008", 134_515_008, True),
        ("134,515,008", 134_515_009, False),
        ("134,515,00", 13_451_500, False),
        ("134.5 M", 134_515_008, True),
        ("134 MB", 134_217_728, True),
        ("128 MiB", 134_217_728, True),
        ("4 min", 240, True),
        ("-3.2 points", -0.032, True),
        ("−3.2 points", -0.032, True),
        ("3.2 points", -0.032, False),
        ("0 %", 0.0, True),
        ("0.5 %", 0.005, True),
        ("40 steps", 40, True),
        ("12.3 tokens/s", 12.34, True),
        ("nearly all", 0.99, False),
        ("1 %", float("nan"), False),
    ],
)
def test_figures_are_compared_as_they_are_printed(shown, value, right):
    assert shows(shown, value) is right


def test_markers_are_found_where_prose_puts_them():
    text = (
        "LoRA scores **93 %**<!-- run:03_lora:exact_match.lora --> after "
        "`134,515,008` <!--run:02_full:trainable_parameters.full--> and | 1.7 s"
        "<!-- run:03_lora:seconds.lr 0.001 --> |; from 40 to 2.31<!-- run:a:b -->, "
        "none<!-- run:a:c --> <!-- a comment -->"
    )
    assert find_markers(text) == [
        ("93 %", "03_lora:exact_match.lora"),
        ("134,515,008", "02_full:trainable_parameters.full"),
        ("1.7 s", "03_lora:seconds.lr 0.001"),
        ("2.31", "a:b"),
        ("", "a:c"),
    ]


def test_a_wrong_figure_in_prose_is_named():
    values = {"a:x": 0.93, "a:name": "lora", "a:share_percent": 0.4955}

    def find(path):
        if path not in values:
            raise RecordError(f"no {path}")
        return values[path]

    assert check_marker("93 %", "a:x", find) is None
    assert check_marker("0.4955 %", "a:share_percent", find) is None
    assert check_marker("94 %", "a:x", find) == "94 %: a:x is 0.93"
    assert "not a number" in check_marker("94 %", "a:name", find)
    assert "no a:y" in check_marker("94 %", "a:y", find)
    text = "93 %<!-- run:a:x -->, 92 %<!-- run:a:x -->, all<!-- run:a:x -->"
    assert check_text(text, find) == [
        "92 %: a:x is 0.93",
        "run:a:x: no figure stands before the marker",
    ]
