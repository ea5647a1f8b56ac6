"""Recorded runs of a lesson's own cells: their seeds, scores, and what draws data."""

import json
import shutil
from dataclasses import replace

import pytest
from recomputing import differences

from course_utils import records
from maintenance import cells
from maintenance.runs import lesson
from maintenance.runs.__main__ import record_family
from maintenance.runs.lesson import LessonExperiment, run_lesson
from maintenance.runs.lists import LESSON_RUNS
from maintenance.store import METRICS

DRAWN = "10_beyond_text: words"
WORDS = LessonExperiment("LoRA", "words", "LoRA", DRAWN, 1e-2)
PLACE = "few, unlike"
PICTURES = LessonExperiment("head", "pictures", "head alone", DRAWN, 1e-2, PLACE)


@pytest.fixture
def short(monkeypatch):
    """Few steps, and no cells kept from another test."""
    small = {"sort": 2, "task": 2, "words": 8}
    small |= {"letters": 1, "digits": 2, "much": 20, "test": 10}
    for name in ("words", "pictures"):
        part = replace(lesson.PARTS[name], settings=small)
        monkeypatch.setitem(lesson.PARTS, name, part)
    lesson._prepared.cache_clear()
    yield
    lesson._prepared.cache_clear()


@pytest.mark.parametrize("experiment", [WORDS, PICTURES], ids=["words", "pictures"])
def test_a_run_is_its_seeds_alone_and_recomputes(
    experiment, short, tmp_path, monkeypatch
):
    monkeypatch.setattr(records, "data_folder", lambda: tmp_path)
    runs = [experiment, replace(experiment, seed=1), replace(experiment, label="again")]
    record_family("10_x", runs, command="make runs LESSON=10", say=lambda text: None)
    record = records.load_record("10_x")
    first, other, again = record["runs"]
    assert differences(record) == []
    assert first["loss"] == again["loss"] != other["loss"]
    assert first["metrics"] == again["metrics"] and len(first["loss"]) == 2
    assert first["measured"]["asked"] in (8, 10)
    assert record["data"] == {"name": DRAWN, "sha256": cells.source_hash(DRAWN)}
    experiments = [replace(run, seed=0) for run in runs]
    assert record_family("10_x", experiments[:1], command="again") == 0


def test_the_head_alone_trains_no_layer(short):
    run = run_lesson(PICTURES)
    assert run["trainable_parameters"] == 10 * 64 + 10
    assert run["settings"]["place"] == PLACE and run["settings"]["much"] == 20


def test_a_changed_drawing_cell_is_other_data(tmp_path, monkeypatch):
    before = cells.source_hash(DRAWN)
    shutil.copy(cells.NOTEBOOKS / "10_beyond_text.ipynb", tmp_path)
    monkeypatch.setattr(cells, "NOTEBOOKS", tmp_path)
    path = tmp_path / "10_beyond_text.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for changed in ("draw", "words"):
        assert cells.source_hash(DRAWN) == before
        (cell,) = [c for c in notebook["cells"] if c["id"] == changed]
        cell["source"] = [*cell["source"], "\nseed = 7"]
        path.write_text(json.dumps(notebook), encoding="utf-8")
    assert cells.source_hash(DRAWN) != before


def test_the_time_of_switching_is_a_median_of_pairs():
    run = {"measured": {"switching_s": [2.0, 9.0, 3.0], "mixed_s": [1.0, 1.0, 2.0]}}
    assert METRICS["switching_ratio"](run) == 2.0


def test_the_lessons_settings_are_those_of_the_record():
    """Live and recorded runs stand in one figure, so they take the same steps."""
    for name, part in (("10_words", "words"), ("10_pictures", "pictures")):
        if name in records.list_records():
            text = cells.cell_source(lesson.PARTS[part].stem, "settings")
            for key, value in lesson.PARTS[part].settings.items():
                live = f'"{key}": {value}' in text
                assert live or key == "words", key
    assert {run.seed for run in LESSON_RUNS["12"]["12_combining"]} == {0, 1, 2}
