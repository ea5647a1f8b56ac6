"""The runner: order, one line each, failures that name their cell, the exit code."""

import json
import shutil
import sys
from pathlib import Path

import nbformat
import psutil
import pytest

from course_utils import lessons
from maintenance import course, runner

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Three lessons: one that prints its Python, one that fails, one that saves."""
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    shutil.copy(DATA / "canary_failing.ipynb", notebooks / "91_failing.ipynb")
    who = "import os, sys\nprint(sys.executable, os.environ['COURSE_PROFILE'])"
    save = "from course_utils.lessons import save_result\nsave_result('92', 'x → y')"
    for name, source in (("90_who", who), ("92_saves", save)):
        cell = nbformat.v4.new_code_cell(source)
        notebook = nbformat.v4.new_notebook(cells=[cell])
        notebook.metadata["kernelspec"] = {"name": "no-such", "display_name": "x"}
        nbformat.write(notebook, notebooks / f"{name}.ipynb")
    monkeypatch.setattr(course, "NOTEBOOKS", notebooks)
    monkeypatch.setattr(course, "fetch_model", lambda: None)
    monkeypatch.setenv("COURSE_PROFILE", "smoke")
    monkeypatch.setenv("COURSE_BUILD", str(tmp_path / "build"))
    return notebooks


def test_lessons_are_found_in_order_or_one_alone(folder):
    stems = [p.stem for p in course.find_lessons(folder)]
    assert stems == ["90_who", "91_failing", "92_saves"]
    assert [p.stem for p in course.find_lessons(folder, "91")] == ["91_failing"]
    assert [p.stem for p in course.find_lessons(folder, "92_s")] == ["92_saves"]
    with pytest.raises(FileNotFoundError, match="there are: 90_who"):
        course.find_lessons(folder, "93")
    with pytest.raises(FileNotFoundError, match="none"):
        course.find_lessons(folder / "empty")


def test_one_digit_means_two(folder, tmp_path):
    (folder / "02_x.ipynb").write_text("{}", encoding="utf-8")
    assert [p.stem for p in course.find_lessons(folder, "2")] == ["02_x"]


def test_the_whole_course_with_a_failing_lesson(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(course, "find_lessons", lambda only: sorted(folder.iterdir()))
    out = tmp_path / "out"
    code = course.main(["--profile", "smoke", "--out", str(out)])
    printed = capsys.readouterr().out
    assert code == 1
    lines = [line for line in printed.splitlines() if line.startswith(("✓", "✗"))]
    assert [line.split()[1] for line in lines] == [
        "90_who",
        "91_failing",
        "92_saves",
    ]
    assert [line[0] for line in lines] == ["✓", "✗", "✓"]
    assert "cell broken (# divide): ZeroDivisionError: division by zero" in lines[1]
    assert lines[2].endswith("x → y")
    assert "| 2 of 3 ran |" in printed and "FAILED: cell broken" in printed
    who = nbformat.read(out / "notebooks" / "90_who.ipynb", as_version=4)
    assert who.cells[0].outputs[0].text == f"{sys.executable} smoke\n"
    failed = json.loads((out / "notebooks" / "91_failing.ipynb").read_text())
    assert failed["cells"][3]["execution_count"] is None, "cells after it did not run"


def test_no_such_lesson_says_so(folder, capsys):
    assert course.main(["--lesson", "77"]) == 2
    assert "no lesson '77'" in capsys.readouterr().out


def test_a_stale_result_is_not_taken_for_a_new_one(folder, tmp_path, monkeypatch):
    lessons.save_result("90", "yesterday's")
    outcome = course.run_lesson(folder / "90_who.ipynb", tmp_path)
    assert outcome.ok and outcome.result == "ran; it saved no result"


def test_a_cell_over_its_time_is_named(folder, tmp_path):
    cell = nbformat.v4.new_code_cell(
        "# waits\nimport time\ntime.sleep(3600)", id="slow"
    )
    notebook = nbformat.v4.new_notebook(cells=[cell])
    notebook.metadata["execution"] = {"timeout": 2}
    nbformat.write(notebook, folder / "93_slow.ipynb")
    outcome = course.run_lesson(folder / "93_slow.ipynb", tmp_path)
    assert not outcome.ok and outcome.seconds < 1800
    assert outcome.result.startswith("cell slow (# waits): CellTimeoutError")


def test_no_kernel_outlives_its_lesson(folder, tmp_path):
    """Nine lessons that each kept a model would fill a laptop's memory."""
    for name, more in (("95_ends", ""), ("96_fails", "; 1 / 0")):
        cell = nbformat.v4.new_code_cell(f"import os; print(os.getpid()){more}")
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / f"{name}.ipynb")
        assert course.run_lesson(folder / f"{name}.ipynb", tmp_path).ok == (not more)
        done = nbformat.read(tmp_path / "notebooks" / f"{name}.ipynb", as_version=4)
        assert not psutil.pid_exists(int(done.cells[0].outputs[0].text))


@pytest.mark.skipif(sys.platform == "win32", reason="no peak is measured there")
def test_a_lesson_has_the_peak_of_its_own_kernel(folder, tmp_path):
    """Whatever this process holds, or the lesson before it held."""
    mine = b"x" * 2**29
    source = "held = b'x' * 2**29\nimport time\ntime.sleep(2)\ndel held\n1 / {}"
    peaks = {}
    for name, code in (("95_large", source.format(0)), ("96_small", "1 / 1")):
        cell = nbformat.v4.new_code_cell(code)
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / f"{name}.ipynb")
        peaks[name] = course.run_lesson(folder / f"{name}.ipynb", tmp_path).peak_bytes
    assert len(mine) < peaks["95_large"] < 1.5 * 2**29, "also of a lesson that fails"
    assert 2**24 < peaks["96_small"] < 2**28


def test_a_dead_kernel_is_a_failure_and_not_a_crash(folder, tmp_path):
    cell = nbformat.v4.new_code_cell("import os\nos._exit(1)", id="dies")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / "94_dies.ipynb")
    outcome = course.run_lesson(folder / "94_dies.ipynb", tmp_path)
    assert not outcome.ok
    assert outcome.result.startswith("cell dies (import os): DeadKernelError")


def test_the_table_escapes_bars():
    text = course.table([course.Outcome("02_x", False, 3.0, "a | b")])
    assert "FAILED: a \\| b |" in text and "| 0 of 1 ran | 3 | – |" in text


def test_the_table_ends_with_the_largest_peak():
    lessons = [course.Outcome(f"0{n}_x", True, 1.0, "", n * 2**30) for n in (1, 3, 2)]
    assert "| 3 of 3 ran | 3 | 3.0 GiB |" in course.table(lessons)


def test_kernels_find_folders_named_from_where_the_command_was_given(
    tmp_path, monkeypatch
):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COURSE_CACHE", "cache")
    monkeypatch.setenv("COURSE_BUILD", "out")
    monkeypatch.setenv("COURSE_MODEL", "mine")
    found = runner.kernel_environment()
    assert found["COURSE_CACHE"] == str(tmp_path / "cache")
    assert found["COURSE_BUILD"] == str(tmp_path / "out")
    assert found["COURSE_MODEL"] == str(tmp_path / "mine")
    monkeypatch.setenv("COURSE_MODEL", "org/name")
    monkeypatch.delenv("COURSE_BUILD")
    assert runner.kernel_environment()["COURSE_MODEL"] == "org/name"
    assert "COURSE_BUILD" not in runner.kernel_environment()
