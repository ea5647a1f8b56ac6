"""The register of the exercises: one test and one hint for each.

The tests of lesson NN stand in `course_utils/exercises_NN.py`; they are imported when
that lesson's first check runs.

    @exercise("2.1", hint="Count the tied embedding once.")
    def _(answer, *, model):
        return answer == sum(p.numel() for p in model.parameters())
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Test = Callable[..., bool]


@dataclass(frozen=True)
class Exercise:
    """One exercise: its number `N.M`, its test, and the hint after a wrong answer."""

    number: str
    test: Test
    hint: str

    def accepts(self, answer: Any, **facts: Any) -> bool:
        """Say whether the answer is right; an exception in the test means it is not.

        Args:
            answer: what the learner wrote; never trusted to be of the right type.
            facts: what the test compares with, by the names its function takes.
        """
        try:
            return bool(self.test(answer, **facts))
        except Exception:
            return False


REGISTER: dict[str, Exercise] = {}


def exercise(number: str, *, hint: str) -> Callable[[Test], Test]:
    """Register the decorated function as the test of exercise `number`.

    Args:
        number: `"N.M"`: lesson N, exercise M.
        hint: one sentence that helps without giving the answer away.

    Raises:
        ValueError: the number is taken, or the hint is empty.
    """
    if number in REGISTER:
        raise ValueError(f"exercise {number} is registered twice")
    if not hint.strip():
        raise ValueError(f"exercise {number} has no hint")

    def register(test: Test) -> Test:
        REGISTER[number] = Exercise(number, test, hint)
        return test

    return register


def find(number: str) -> Exercise | None:
    """Return an exercise, or None where there is no such exercise.

    Args:
        number: `"N.M"`: lesson N, exercise M.

    >>> find("99.1") is None
    True
    """
    lesson = number.partition(".")[0]
    if number not in REGISTER and lesson.isdigit():
        module = f"course_utils.exercises_{int(lesson):02d}"
        if importlib.util.find_spec(module):
            importlib.import_module(module)
    return REGISTER.get(number)
