"""Tests and hints of the exercises in lesson 00."""

from __future__ import annotations

import math

from course_utils import scoring
from course_utils.lessons import exercise


@exercise("0.1", hint="Multiply the number of parameters by the bytes of each.")
def _(answer):
    return answer == 134_515_008 * 2


@exercise("0.2", hint="Count the pairs that are the same JSON, and divide by all.")
def _(answer, *, given, references):
    return math.isclose(answer, scoring.exact_match(given, references), rel_tol=1e-3)


@exercise("0.3", hint="Does the bot need a new form, or facts that change?")
def _(answer):
    return answer.strip().lower() == "facts in the prompt"
