"""Each lesson executes once, with its wrong answers and solutions, without a network.

The canaries in tests/data show that what must fail does fail.
"""

import os
from pathlib import Path

import nbformat
import pytest
from lesson_copies import BrokenExercise, check_call, execute, make_copy, solution_code

ROOT = Path(__file__).resolve().parents[2]
LESSONS = sorted((ROOT / "notebooks").glob("*.ipynb"))
FOLDER = ROOT / "build" / "lesson_tests"
LESSON_LIMIT_S = 4200  # beyond that it hangs, whatever else the machine does


def canary(name, tmp_path):
    notebook = nbformat.read(ROOT / "tests" / "data" / f"{name}.ipynb", as_version=4)
    return execute(make_copy(notebook), name, tmp_path)


@pytest.fixture(scope="session")
def model_at_hand():
    """Fetch and convert the built-in model before a lesson's clock starts."""
    from course_utils import models

    models.release(models.load_model())


def test_a_lesson_in_order_passes_and_may_use_loopback(tmp_path):
    run = canary("canary_good", tmp_path)
    assert run.complaint == ""
    outputs = [
        o.text for c in run.notebook.cells if c.cell_type == "code" for o in c.outputs
    ]
    signs = [line[0] for text in outputs for line in text.splitlines()]
    assert signs == ["…", "✗", "✗", "✓"]


def test_an_outward_connection_fails(tmp_path):
    run = canary("canary_network", tmp_path)
    assert "outward connection blocked: socket" in run.failure
    assert run.blocked[0].endswith(" to 192.0.2.1:80")


def test_a_swallowed_connection_of_a_child_process_fails_too(tmp_path):
    run = canary("canary_swallowed", tmp_path)
    assert not run.failure, "the notebook itself raises nothing"
    assert run.blocked[0].endswith(" to the proxy")
    assert "tried to connect outward" in run.complaint


def test_a_check_that_accepts_a_wrong_answer_fails(tmp_path):
    run = canary("canary_accepts_wrong", tmp_path)
    assert "expected 'wrong' after: answer = 3" in run.complaint


def test_a_later_cell_that_needs_the_answer_fails(tmp_path):
    run = canary("canary_needs_answer", tmp_path)
    assert "TypeError" in run.complaint
    assert "answer + 1" in run.complaint


def test_exercises_of_another_form_are_refused():
    with pytest.raises(BrokenExercise, match="one call"):
        check_call("x = 1\ncheck('1.1', x)")
    with pytest.raises(BrokenExercise, match="not 2"):
        solution_code("```python\na = 1\n```\n\n```python\nb = 1\n```\n")
    notebook = nbformat.read(ROOT / "tests/data/canary_good.ipynb", as_version=4)
    notebook.cells = [c for c in notebook.cells if c.id != "solution-98-1"]
    with pytest.raises(BrokenExercise, match="solution-98-1"):
        make_copy(notebook)


@pytest.mark.model
@pytest.mark.timeout(LESSON_LIMIT_S)
@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_lesson(path, lesson_seconds, model_at_hand):
    notebook = make_copy(nbformat.read(path, as_version=4))
    run = execute(notebook, path.stem, FOLDER)
    lesson_seconds(path.stem, run.seconds, run.processor_s)
    assert not run.complaint, run.complaint
    code = [cell for cell in run.notebook.cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in code[:5]), "no result in the first five cells"
    result = ROOT / "build" / "results" / f"{path.stem[:2]}.json"
    assert result.stat().st_mtime > os.path.getmtime(FOLDER / f"{path.stem}.start")
