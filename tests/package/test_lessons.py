"""Exercises and their tests, checks, guesses, cards and saved results."""

import ast
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from course_utils import lessons, runtime
from course_utils.lessons import REGISTER as EXERCISES
from course_utils.lessons import Exercise


@pytest.fixture(autouse=True)
def one_exercise(monkeypatch):
    four = Exercise("97.1", lambda a, *, right: a == right, "Count again.")
    monkeypatch.setattr(lessons, "REGISTER", {"97.1": four})


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


@pytest.mark.parametrize("answer", ["four", None, [], object(), float("nan")])
def test_an_exception_in_a_test_means_wrong(answer):
    assert not Exercise("97.1", lambda a: 1 / 0, "hint").accepts(answer)
    assert not Exercise("97.1", lambda a: a + 1 == 5, "hint").accepts(answer)


def test_missing_facts_mean_wrong_and_not_an_error():
    assert not Exercise("97.1", lambda a, *, total: a == total, "h").accepts(1)


def registrations():
    """Return number and hint of each registered test, in the order of the file."""
    calls = [
        node.args
        for node in ast.walk(ast.parse(Path(lessons.__file__).read_text("utf-8")))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") in ("_exercise", "_number")
        and isinstance(node.args[0], ast.Constant)
    ]
    return [tuple(map(ast.literal_eval, args[:2])) for args in calls]


def test_exercises_are_numbered_without_a_gap_and_have_a_hint():
    numbers = sorted(
        tuple(map(int, number.split("."))) for number, _ in registrations()
    )
    expected = [
        (lesson, m + 1)
        for lesson, count in sorted(Counter(n for n, _ in numbers).items())
        for m in range(count)
    ]
    assert numbers == expected and {lesson for lesson, _ in numbers} >= set(range(9))
    assert all(hint.strip() for _, hint in registrations())
    assert {n: e.hint for n, e in EXERCISES.items()} == dict(registrations())


def test_a_check_loads_torch_only_where_its_test_needs_it():
    code = (
        "import sys\nfrom course_utils.lessons import check\n"
        "assert check('0.1', 269_030_016) == check('8.1', 2500) == 'correct'\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
        "assert check('4.2', (0, 0), weight=0, r=1) == 'wrong'\n"
        "assert 'torch' in sys.modules\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("number", "facts", "right", "wrong"),
    [
        (
            "3.3",
            {"names": [f"layers.{i}.{p}" for i in (2, 20) for p in ("q_proj", "up")]},
            (r"layers\.20\.q_proj", r".*[12]\d\..*[qv]_proj"),
            (r"layers\.2.*q_proj", r"layers\.20\..*", "(", 20),
        ),
        ("0.1", {}, (269_030_016,), (269_030_017, "269030016", [269_030_016])),
        ("2.3", {}, (107.8, 108, 107), (106, 109, 26.95)),
        ("7.1", {}, (4.063, 4.0635), (4.0625, 4.065, 4.125)),
        ("8.1", {}, (2500, 2500.0), (100, 2400, 50)),
        (
            "6.4",
            {"matrix": [[3, 1], [2, 2]]},
            ([0.75, 0.5], (0.75, 0.5)),
            ([0.75], [0.5, 0.75], [0.75, 0.5, 0.5]),
        ),
        (
            "8.2",
            {"points": {"A": (1, 0.3), "B": (2, 0.2), "C": (2, 0.5), "D": (3, 0.5)}},
            (["A", "C"], ("C", "A")),
            (["C"], ["A", "B", "C"], ["A", "A", "C"], "AC D", []),
        ),
        (
            "8.3",
            {"losses": {1e-3: 0.6, 3e-4: 0.5, 3e-3: None}},
            (1e-4, 0.0001),
            (3e-4, 1e-2, 1e-3),
        ),
    ],
)
def test_an_exercise_takes_right_answers_and_no_others(number, facts, right, wrong):
    exercise = EXERCISES[number]
    assert all(exercise.accepts(answer, **facts) for answer in right)
    assert not any(exercise.accepts(answer, **facts) for answer in wrong)


def test_a_whole_number_may_come_from_a_tensor():
    import torch

    values = torch.tensor([3.0, 1.0, 0.5])
    rank = ((values**2).cumsum(0) / (values**2).sum() < 0.9).sum() + 1
    rank_of, batch_of = EXERCISES["4.3"], EXERCISES["2.4"]
    assert rank_of.accepts(rank, singular_values=values)
    assert rank_of.accepts(2, singular_values=values)
    assert not rank_of.accepts(torch.tensor(1), singular_values=values)
    assert not rank_of.accepts(2.0, singular_values=values)
    assert batch_of.accepts(12.0, peak_gib=lambda batch: batch + 1.5)
    assert not batch_of.accepts(12.5, peak_gib=lambda batch: batch + 1.5)


def test_a_notebook_does_not_echo_the_verdict(capsys):
    verdict = lessons.check("97.1", 4, right=4)
    capsys.readouterr()
    verdict._ipython_display_()
    assert capsys.readouterr().out == ""


def test_guess_and_compare(capsys):
    lessons.guess(12, "How many layers?").compare(30)
    lessons.guess(..., "How large?").compare(269, "MB")
    lessons.guess(7, "On a card?").compare(6.8, "GiB", word="predicted")
    assert capsys.readouterr().out.splitlines() == [
        "How many layers? Your guess: 12.",
        "You guessed 12; measured: 30.",
        "How large?",
        "Measured: 269 MB.",
        "On a card? Your guess: 7.",
        "You guessed 7 GiB; predicted: 6.8 GiB.",
    ]


def test_result_card_in_text_and_in_markdown():
    card = lessons.result_card("Run", exact_match="91 %", seconds=12.345, steps=40)
    assert str(card) == repr(card)
    assert "exact match  91 %" in str(card)
    assert card._repr_markdown_().splitlines() == [
        "| Run |  |",
        "|---|---:|",
        "| exact match | 91 % |",
        "| seconds | 12.3 |",
        "| steps | 40 |",
    ]


def test_save_result_is_read_back(build, capsys):
    torch = pytest.importorskip("torch")
    lessons.save_result("02", "3 % → 91 %", after=torch.tensor(0.5), steps=40)
    assert capsys.readouterr().out == "Lesson 02: 3 % → 91 %\n"
    assert lessons.load_result("02") == {
        "lesson": "02",
        "headline": "3 % → 91 %",
        "profile": "smoke",
        "numbers": {"after": 0.5, "steps": 40},
    }
    assert [p.name for p in (build / "results").iterdir()] == ["02.json"]


def test_save_result_refuses_what_is_no_result(build):
    for number in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="loss is"):
            lessons.save_result("02", "x", loss=number)
    for lesson in ("2", "../02"):
        with pytest.raises(ValueError, match="two digits"):
            lessons.save_result(lesson, "x", loss=1.0)
    assert lessons.load_result("02") is None


def test_a_result_that_cannot_be_written_leaves_the_old_one(build):
    lessons.save_result("02", "first", loss=1.0)
    with pytest.raises(TypeError):
        lessons.save_result("02", "second", loss=object())
    text = (build / "results" / "02.json").read_text(encoding="utf-8")
    assert json.loads(text)["headline"] == "first"
