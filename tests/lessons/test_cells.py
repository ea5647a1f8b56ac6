"""Cells of a lesson as a namespace for tests."""

import pytest
from cells import cells


def test_cells_are_executed_in_order_into_one_namespace():
    lesson = cells("07_qlora", "imports", "int-levels")
    assert lesson.int_levels(2).tolist() == [-1, 0, 1]
    assert lesson.int_levels.__globals__ is vars(lesson)


def test_of_a_cell_that_also_runs_something_the_definitions_alone():
    lesson = cells("03_lora", "step0", definitions=True)
    assert callable(lesson.logits_of) and not hasattr(lesson, "original")
    with pytest.raises(NameError):
        cells("03_lora", "step0")


def test_constants_are_definitions():
    lesson = cells("06_prefix_tuning", "settings", definitions=True)
    assert vars(lesson).keys().isdisjoint({"profile", "settings", "folder"})
    assert cells("05_prompt_tuning", "distance", definitions=True).steps == 20


def test_a_missing_cell_is_named_with_those_that_are_there():
    with pytest.raises(KeyError, match="03_lora.ipynb has no code cell 'scrach'.*inje"):
        cells("03_lora", "imports", "scrach")
