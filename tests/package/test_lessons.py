"""Checks, guesses, cards and saved results."""

import json

import pytest

from course_utils import lessons, runtime
from course_utils import lessons as exercises


@pytest.fixture(autouse=True)
def one_exercise(monkeypatch):
    four = exercises.Exercise("97.1", lambda a, *, right: a == right, "Count again.")
    monkeypatch.setattr(exercises, "REGISTER", {"97.1": four})


@pytest.fixture
def build(monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "build_folder", lambda: tmp_path)
    monkeypatch.setenv("COURSE_PROFILE", "smoke")
    return tmp_path


@pytest.mark.parametrize(
    ("answer", "verdict", "line"),
    [
        (4, "correct", "✓ Exercise 97.1: correct.\n"),
        (5, "wrong", "✗ Exercise 97.1: not yet. Hint: Count again.\n"),
        (0, "wrong", "✗ Exercise 97.1: not yet. Hint: Count again.\n"),
        (False, "wrong", "✗ Exercise 97.1: not yet. Hint: Count again.\n"),
        (..., "unanswered", "… Exercise 97.1: not answered yet.\n"),
        (None, "unanswered", "… Exercise 97.1: not answered yet.\n"),
    ],
)
def test_check_says_one_line(answer, verdict, line, capsys):
    assert lessons.check("97.1", answer, right=4) == verdict
    assert capsys.readouterr().out == line


class Hostile:
    """Raises whatever is asked of it."""

    def __eq__(self, other):
        raise RuntimeError("no")

    __bool__ = __len__ = __repr__ = __iter__ = lambda self: 1 / 0


def test_check_never_raises():
    assert lessons.check("97.1", Hostile(), right=4) == "wrong"
    assert lessons.check("97.1", 4) == "wrong", "a fact is missing"
    assert lessons.check("97.1", 4, other=4) == "wrong", "a fact too many"
    assert lessons.check("97.2", 4) == "wrong", "no such exercise"
    assert lessons.check("x", 4) == "wrong"


def test_an_array_valued_comparison_is_no_answer():
    torch = pytest.importorskip("torch")
    assert lessons.check("97.1", torch.tensor([4, 4]), right=4) == "wrong"


def test_a_notebook_does_not_echo_the_verdict(capsys):
    verdict = lessons.check("97.1", 4, right=4)
    capsys.readouterr()
    verdict._ipython_display_()
    assert capsys.readouterr().out == ""


def test_guess_and_compare(capsys):
    lessons.guess(12, "How many layers?").compare(30)
    lessons.guess(..., "How large?").compare(269, "MB")
    assert capsys.readouterr().out.splitlines() == [
        "How many layers? Your guess: 12.",
        "You guessed 12; measured: 30.",
        "How large? No guess yet; replace the dots to make one.",
        "Measured: 269 MB.",
    ]


def test_result_card_in_text_and_in_markdown():
    card = lessons.result_card("Run", exact_match="91 %", seconds=12.345, steps=40)
    assert str(card) == repr(card)
    assert "exact match  91 %" in str(card)
    assert card._repr_markdown_().splitlines() == [
        "| **Run** | |",
        "|---|---|",
        "| exact match | 91 % |",
        "| seconds | 12.3 |",
        "| steps | 40 |",
    ]


def test_save_result_is_read_back(build, capsys):
    torch = pytest.importorskip("torch")
    lessons.save_result("02", "3 % → 91 %", after=torch.tensor(0.5), steps=40)
    assert capsys.readouterr().out == "Lesson 02: 3 % → 91 %\n"
    assert lessons.headline("02") == "3 % → 91 %"
    assert lessons.load_result("02") == {
        "lesson": "02",
        "headline": "3 % → 91 %",
        "profile": "smoke",
        "numbers": {"after": 0.5, "steps": 40},
    }
    assert [p.name for p in (build / "results").iterdir()] == ["02.json"]


def test_save_result_refuses_what_is_no_result(build):
    for lesson in ("2", "two", "002"):
        with pytest.raises(ValueError, match="two digits"):
            lessons.save_result(lesson, "x")
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="loss is"):
            lessons.save_result("02", "x", loss=number)
    assert lessons.load_result("02") is None and lessons.headline("02") is None


def test_a_result_that_cannot_be_written_leaves_the_old_one(build):
    lessons.save_result("02", "first", loss=1.0)
    with pytest.raises(TypeError):
        lessons.save_result("02", "second", loss=object())
    text = (build / "results" / "02.json").read_text(encoding="utf-8")
    assert json.loads(text)["headline"] == "first"
