"""What a lesson needs in order to teach: guesses, checks, result cards, results.

Nothing here raises on what a learner writes: a wrong answer is a line with a hint.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from course_utils import runtime
from course_utils.runtime import replace_file

# --- exercises ---
# The register of the exercises: one test and one hint for each.
#
# The tests of lesson NN stand in `course_utils/exercises_NN.py`; they are imported when
# that lesson's first check runs.
#
#     @exercise("2.1", hint="Count the tied embedding once.")
#     def _(answer, *, model):
#         return answer == sum(p.numel() for p in model.parameters())

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


SIGNS = {"correct": "✓", "wrong": "✗", "unanswered": "…"}


class Verdict(str):
    """The result of a check: a string that a notebook does not echo below its line."""

    def _ipython_display_(self) -> None:
        """Show nothing: the check has already printed its line."""


def check(number: str, answer: Any = ..., **facts: Any) -> Verdict:
    """Check the answer to one exercise and print one line about it.

    Args:
        number: the exercise, `"N.M"`.
        answer: the learner's answer; `...` or `None` means "not answered yet".
        facts: what the exercise's test compares with.

    Returns:
        `"correct"`, `"wrong"` or `"unanswered"`. Never raises.

    >>> verdict = check("99.1", ...)
    … Exercise 99.1: not answered yet.
    >>> str(verdict)
    'unanswered'
    """
    found = find(number)
    if answer is None or answer is ...:
        verdict, rest = "unanswered", "not answered yet."
    elif found is None:
        verdict, rest = "wrong", "the course has no such exercise."
    elif found.accepts(answer, **facts):
        verdict, rest = "correct", "correct."
    else:
        verdict, rest = "wrong", f"not yet. Hint: {found.hint}"
    print(f"{SIGNS[verdict]} Exercise {number}: {rest}")
    return Verdict(verdict)


@dataclass(frozen=True)
class Guess:
    """A guess made before the result is seen; `value` is `...` where there is none."""

    value: Any
    question: str

    def _ipython_display_(self) -> None:
        """Show nothing: `guess` has already printed its line."""

    def compare(self, actual: Any, unit: str = "") -> None:
        """Print the guess beside what was measured.

        Args:
            actual: the measured value.
            unit: printed after both values, such as `"MB"`.
        """
        tail = f" {unit}" if unit else ""
        if self.value is None or self.value is ...:
            print(f"Measured: {actual}{tail}.")
        else:
            print(f"You guessed {self.value}{tail}; measured: {actual}{tail}.")


def guess(value: Any, question: str) -> Guess:
    """Note a guess before the result is known, and print it.

    Args:
        value: the learner's guess; `...` means "no guess", which is fine.
        question: what is being guessed, one sentence.

    >>> note = guess(3, "How many layers?")
    How many layers? Your guess: 3.
    >>> note.compare(30)
    You guessed 3; measured: 30.
    """
    none = value is None or value is ...
    said = "No guess yet; replace the dots to make one" if none else "Your guess"
    print(f"{question} {said}." if none else f"{question} {said}: {value}.")
    return Guess(value, question)


@dataclass(frozen=True)
class Table:
    """Texts in columns; a notebook shows a table, `print` aligned columns.

    The first column is flush left, the others, numbers as a rule, are flush right.

    Attributes:
        head: the columns' names.
        rows: one tuple a line, as long as `head`.
        caption: a line above it, or nothing.

    >>> print(Table(("method", "loss"), (("LoRA", "0.31"), ("full", "1.2"))))
    method  loss
    LoRA    0.31
    full     1.2
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def __str__(self) -> str:
        lines = [self.head, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [
            [text.rjust(width) for text, width in zip(line, widths, strict=True)]
            for line in lines
        ]
        for cells, (first, *_) in zip(aligned, lines, strict=True):
            cells[0] = first.ljust(widths[0])
        texts = ["  ".join(cells).rstrip() for cells in aligned]
        return "\n".join([self.caption, *texts] if self.caption else texts)

    def _repr_markdown_(self) -> str:
        rule = "|---|" + "---:|" * (len(self.head) - 1)
        head, *rows = (
            "| " + " | ".join(line) + " |" for line in [self.head, *self.rows]
        )
        above = [self.caption, ""] if self.caption else []
        return "\n".join([*above, head, rule, *rows])


@dataclass(frozen=True)
class ResultCard:
    """A small two-column table with a title, in Markdown or in plain text."""

    title: str
    rows: dict[str, str]

    def __str__(self) -> str:
        width = max(map(len, self.rows), default=0)
        lines = [f"  {name:<{width}}  {value}" for name, value in self.rows.items()]
        return "\n".join([self.title, *lines])

    def _repr_markdown_(self) -> str:
        lines = [f"| {name} | {value} |" for name, value in self.rows.items()]
        return "\n".join([f"| **{self.title}** | |", "|---|---|", *lines])

    def __repr__(self) -> str:
        return str(self)


def result_card(title: str, **rows: Any) -> ResultCard:
    """Return a card with one row per keyword; underscores in names become spaces.

    Args:
        title: what the card is about.
        rows: values as they are to be read; floats are shown with three digits.

    >>> print(result_card("LoRA", exact_match="91 %", seconds=12.345))
    LoRA
      exact match  91 %
      seconds      12.3
    """
    shown = {
        name.replace("_", " "): f"{value:.3g}"
        if isinstance(value, float)
        else str(value)
        for name, value in rows.items()
    }
    return ResultCard(title, shown)


def save_result(lesson: str, headline: str, **numbers: Any) -> None:
    """Write the lesson's result to `build/results/NN.json` and print its headline.

    Args:
        lesson: the lesson's two digits, such as `"02"`.
        headline: one short line, shown by `make course`.
        numbers: the figures behind it: ints, floats, or 0-dimensional tensors.

    Raises:
        ValueError: the lesson is not two digits, or a number is not finite.
    """
    if not (len(lesson) == 2 and lesson.isdigit()):
        raise ValueError(f"expected two digits such as '02', got {lesson!r}")
    plain = {k: v.item() if hasattr(v, "item") else v for k, v in numbers.items()}
    for name, value in plain.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"lesson {lesson}: {name} is {value}, not a finite number")
    path = runtime.build_folder() / "results" / f"{lesson}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "lesson": lesson,
        "headline": headline,
        "profile": runtime.get_profile().name,
        "numbers": plain,
    }
    whole = path.with_suffix(f".{os.getpid()}.tmp")
    whole.write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
    replace_file(whole, path)
    print(f"Lesson {lesson}: {headline}")


def load_result(lesson: str) -> dict[str, Any] | None:
    """Return what `save_result` wrote for the lesson, or None if it has not run.

    Args:
        lesson: the lesson's two digits.

    Returns:
        A dict with the keys `lesson`, `headline`, `profile` and `numbers`.
    """
    path = runtime.build_folder() / "results" / f"{lesson}.json"
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def headline(lesson: str) -> str | None:
    """Return the one-line result of a lesson that has run here, else None."""
    result = load_result(lesson)
    return result["headline"] if result else None
