"""The register of exercises: numbers, hints, and tests that never raise."""

import ast
import importlib
from pathlib import Path

import pytest

from course_utils import exercises_02, exercises_04, exercises_08
from course_utils import lessons as exercises
from course_utils.lessons import Exercise, exercise, find

PACKAGE = Path(exercises.__file__).parent


@pytest.fixture(autouse=True)
def own_register(monkeypatch):
    monkeypatch.setattr(exercises, "REGISTER", {})


def test_a_registered_exercise_is_found_with_its_hint():
    @exercise("97.1", hint="Halve it.")
    def _(answer):
        return answer == 2

    found = find("97.1")
    assert found.hint == "Halve it."
    assert found.accepts(2) and not found.accepts(3)


def test_a_number_is_registered_once_and_needs_a_hint():
    exercise("97.1", hint="Halve it.")(lambda answer: True)
    with pytest.raises(ValueError, match="twice"):
        exercise("97.1", hint="Halve it.")
    with pytest.raises(ValueError, match="no hint"):
        exercise("97.2", hint=" ")


@pytest.mark.parametrize("answer", ["four", None, [], object(), float("nan")])
def test_an_exception_in_a_test_means_wrong(answer):
    assert not Exercise("97.1", lambda a: 1 / 0, "hint").accepts(answer)
    assert not Exercise("97.1", lambda a: a + 1 == 5, "hint").accepts(answer)


def test_missing_facts_mean_wrong_and_not_an_error():
    assert not Exercise("97.1", lambda a, *, total: a == total, "h").accepts(1)


def test_unknown_numbers_are_not_found():
    assert find("97.9") is None
    assert find("nonsense") is None
    assert find("") is None


def test_each_module_of_tests_holds_only_its_own_lesson():
    for path in sorted(PACKAGE.glob("exercises_[0-9][0-9].py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        numbers = [
            decorator.args[0].value
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            for decorator in node.decorator_list
            if isinstance(decorator, ast.Call)
            and ast.unparse(decorator.func) == "exercise"
        ]
        lesson = int(path.stem[-2:])
        assert numbers == [f"{lesson}.{m}" for m in range(1, len(numbers) + 1)]


@pytest.mark.parametrize(
    ("number", "facts", "right", "wrong"),
    [
        ("8.1", {}, (2500, 2500.0), (100, 2400, 50)),
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
def test_lesson_8_takes_right_answers_and_no_others(number, facts, right, wrong):
    fresh = importlib.reload(exercises_08)
    assert fresh.__name__.endswith("_08")
    found = find(number)
    assert all(found.accepts(answer, **facts) for answer in right)
    assert not any(found.accepts(answer, **facts) for answer in wrong)


def test_a_whole_number_may_come_from_a_tensor():
    import torch

    for module in (exercises_02, exercises_04):
        importlib.reload(module)
    values = torch.tensor([3.0, 1.0, 0.5])
    rank = ((values**2).cumsum(0) / (values**2).sum() < 0.9).sum() + 1
    found = find("4.3")
    assert found.accepts(rank, singular_values=values)
    assert found.accepts(2, singular_values=values)
    assert not found.accepts(torch.tensor(1), singular_values=values)
    assert not found.accepts(2.0, singular_values=values)
    assert find("2.4").accepts(12.0, peak_gib=lambda batch: batch + 1.5)
    assert not find("2.4").accepts(12.5, peak_gib=lambda batch: batch + 1.5)
