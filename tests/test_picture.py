"""The README's table is what the records say, and its pictures are there."""

import json
import math
import re

import pytest

from course_utils import picture, records
from course_utils.prose_figures import check_text
from course_utils.sweep import MethodResult

README = picture.ROOT / "README.md"


def test_the_table_in_the_readme_is_made_from_the_records():
    text = README.read_text(encoding="utf-8")
    assert picture.fill(text, picture.lesson_stems()) == text, "run `make picture`"


def test_every_lesson_has_its_row():
    rows = picture.table(picture.lesson_stems()).splitlines()[2:]
    assert len(rows) == len(picture.lesson_stems())
    assert {row[0] for row in picture.LESSONS} >= set(picture.lesson_stems())


def test_shares_carry_their_source():
    assert check_text(picture.table(picture.lesson_stems())) == []


def test_a_plan_is_predicted_and_none_is_a_dash():
    assert picture.predicted_gib(None) == "–"
    plan = {"method": "full", "batch_size": 16, "sequence_length": 128}
    assert 2 < float(picture.predicted_gib(plan)) < 14


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="lessons:begin"):
        picture.fill("# Title", [])


def test_both_tables_are_put_between_their_markers(monkeypatch):
    monkeypatch.setattr(picture, "table", lambda stems: "A TABLE")
    monkeypatch.setattr(picture, "FAMILIES", ())
    monkeypatch.setattr(picture, "recorded_methods", lambda: ["swept"])
    monkeypatch.setattr(
        picture, "readme_section", lambda r, lesson, threads: f"{r} {lesson}\n"
    )
    old = "a\n<!-- lessons:begin -->\nold\n<!-- lessons:end -->\nb\n"
    old += "<!-- methods:begin -->\n<!-- methods:end -->\nc"
    new = "a\n<!-- lessons:begin -->\nA TABLE\n<!-- lessons:end -->\nb\n"
    swept = "['swept'] notebooks/08_choosing_a_method.ipynb\n"
    new += f"<!-- methods:begin -->\n{swept}<!-- methods:end -->\nc"
    assert picture.fill(old, []) == new
    assert picture.fill(new, []) == new
    monkeypatch.setattr(picture, "FAMILIES", ("08_none",))  # a family not recorded
    assert "begin -->\n[] notebooks" in picture.fill(old, [])
    with pytest.raises(ValueError, match="methods:begin"):
        picture.fill(old.replace("methods:begin", "x"), [])


def test_the_best_of_the_sweep_carries_its_source_or_is_said_to_be_absent(monkeypatch):
    def result(name, share, complete=True):
        return MethodResult(
            *(name, name, 0.01),
            exact_match=(share,),
            complete=complete,
            record="08_others",
        )

    looked = {"08_others:exact_match.PiSSA lr 0.01": 0.374}
    monkeypatch.setattr(records, "lookup", looked.__getitem__)
    found = [result("LoRA", 0.3), result("PiSSA", 0.4), result("full", 0.5, False)]
    monkeypatch.setattr(picture, "recorded_methods", lambda: found)
    path = "08_others:exact_match.PiSSA lr 0.01"
    said = f"PiSSA best, 37 %<!-- run:{path} --> exact match"
    assert picture.shown(f"{{{picture.BEST}}}") == said
    monkeypatch.setattr(picture, "recorded_methods", lambda: found[2:])
    assert picture.best_recorded() == "the sweep is being recorded"


def test_pictures_named_in_the_readme_are_there_and_made_here():
    text = README.read_text(encoding="utf-8")
    named = set(re.findall(r"\(data/pictures/(\w+)\.png\)", text))
    assert named and named <= set(picture.PICTURES)
    for name in picture.PICTURES:
        assert (picture.ROOT / "data" / "pictures" / f"{name}.png").stat().st_size > 5e3


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A finished run of the course, and an empty folder for records."""
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(records, "runs_folder", lambda: tmp_path / "runs")
    path = tmp_path / "course.json"
    lines = [
        {"lesson": stem, "ok": True, "seconds": 10.0, "result": "well"}
        for stem in picture.lesson_stems()
    ]
    path.write_text(json.dumps({"profile": "cpu", "lessons": lines}))
    return path


def test_times_of_a_full_run_are_kept(course):
    picture.keep_times(course)
    record = records.load_record(picture.TIMES)
    assert record["seconds"] == 10.0 * len(picture.lesson_stems())


def test_times_of_half_a_run_are_refused(course):
    kept = json.loads(course.read_text())
    kept["lessons"][-1]["ok"] = False
    course.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="run `make course`"):
        picture.keep_times(course)


def half_minutes(seconds):
    """A time as the head of a lesson says it: half minutes, rounded up.

    >>> half_minutes(31), half_minutes(62), half_minutes(196)
    ('about 1 minute', 'about 1½ minutes', 'about 3½ minutes')
    """
    halves = max(2, math.ceil(seconds / 30))
    text = f"{halves // 2}{'½' if halves % 2 else ''}"
    return f"about {text} minute{'s' if halves > 2 else ''}"


@pytest.mark.parametrize("stem", picture.lesson_stems())
def test_the_head_of_a_lesson_says_the_recorded_time(stem):
    seconds = records.lookup(f"{picture.TIMES}:seconds.{stem}")
    text = (picture.ROOT / "notebooks" / f"{stem}.ipynb").read_text(encoding="utf-8")
    assert f"| `cpu` | {half_minutes(seconds)} |" in text
