"""Numbers of the README and the lessons are those of the records; pictures exist."""

import json
import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import nbformat
import pytest
from notebook_rules import check_numbers

from course_utils import records
from course_utils.plotting.style import METHOD_COLOURS, METHOD_NAMES
from course_utils.records import RecordError
from course_utils.sweep.experiment import BUDGET
from course_utils.sweep.results import (
    MethodResult,
    _order,
    methods_table,
    recorded_methods,
)
from maintenance import readme

README = (readme.ROOT / "README.md").read_text(encoding="utf-8")
PICTURES = readme.ROOT / "data" / "pictures"
SVG = "{http://www.w3.org/2000/svg}"
STEMS = [path.stem for path in readme.find_lessons()]
TIMED = records.load_record(readme.TIMES)["summary"]["seconds"]


# --- marked numbers --------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "value", "shown"),
    [
        (".0%", 0.9349, "93 %"),
        (".0%", 0.9351, "94 %"),
        (".1%", 0.9312, "93.1 %"),
        (".0%", 0.0, "0 %"),
        (".1%", 0.005, "0.5 %"),
        (".2f", 0.93, "0.93"),
        (".2f", 2.3149, "2.31"),
        (".5f", 3e-05, "0.00003"),
        (".2f", -0.032, "−0.03"),
        ("d", 40, "40"),
        (",d", 134_515_008, "134,515,008"),
        (".1f s", 1.74, "1.7 s"),
        (".0f minutes", 240, "4 minutes"),
        (".0f kB", 46_200, "46 kB"),
        (".0f MB", 134_217_728, "134 MB"),
        (",.0f MiB", 1_316_124_192, "1,255 MiB"),
        (".2f GiB", 6_608_214_016, "6.15 GiB"),
    ],
)
def test_a_number_is_written_in_the_form_of_its_marker(form, value, shown):
    assert readme.show(value, form) == shown


VALUES = {
    "a:nan": math.nan,
    "a:x": 0.93,
    "a:n": 1425,
    "a:loss": -2.31,
    "a:name": "lora",
    "a:s": 1.74,
}


def find(source, path):
    """The value of a made-up record."""
    if path not in VALUES:
        raise RecordError(f"no {path}")
    return VALUES[path]


RIGHT = (
    "It scores **93 %**<!-- run:a:x as .0% --> after `1,425` <!--run:a:n as ,d-->\n"
    "| 1.7 s<!-- run:a:s as .1f s --> | from 40 to −2.31<!-- run:a:loss as .2f --> |"
)


def test_numbers_are_found_where_prose_puts_them():
    assert readme.rewrite(RIGHT, find) == (RIGHT, [], [])


@pytest.mark.parametrize(
    ("old", "new"),
    [("93 %", "94 %"), ("93 %", "193 %"), ("1,425", "1,424"), ("1,425", "11,425")]
    + [("1.7 s", "1.8 s"), ("−2.31", "2.31"), ("−2.31", "−2.32")],
)
def test_a_planted_wrong_number_is_named_and_written_anew(old, new):
    planted = RIGHT.replace(old, new)
    (complaint,) = check_numbers(planted, find)
    assert complaint.startswith(f"{new}: run:a:") and complaint.endswith(f"is {old}")
    assert readme.rewrite(planted, find)[0] == RIGHT


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("93 %<!-- run:a:y as .0% -->", "no a:y"),
        ("93 %<!-- run:a:x -->", "the form is missing"),
        ("93 %<!-- run:a:x as .0q -->", "format"),
        ("93 %<!-- run:a:x as .0f miles -->", "no unit 'miles'"),
        ("93 %<!-- run:a:name as .0% -->", "'lora', not a number"),
        ("9 %<!-- run:a:nan as .0% -->", "nan, not a number"),
        ("all<!-- run:a:x as .0% -->", "no figure such as '93 %'"),
        ("93<!-- run:a:x as .0% -->", "no figure such as '93 %'"),
    ],
)
def test_a_marker_that_cannot_be_read_is_named_and_the_text_left(text, complaint):
    new, wrong, broken = readme.rewrite(text, find)
    assert new == text and wrong == []
    assert len(broken) == 1 and complaint in broken[0]
    assert check_numbers(text, find) == broken


def test_markers_that_are_only_shown_do_not_count():
    shown = "`9 %<!-- run:a:x as .0% -->`\n```\n9 %<!-- run:a:x as .0% -->\n```\n"
    assert readme.rewrite(shown, find) == (shown, [], [])


def test_an_unknown_record_and_an_unknown_plan_are_named():
    assert "99_none" in check_numbers("9 %<!-- run:99_none:x as .0% -->")[0]
    (complaint,) = check_numbers("9 GiB<!-- plan:lore as .1f GiB -->")
    assert "no plan 'lore'" in complaint and "lora" in complaint


def test_a_plan_is_predicted_memory():
    plan = readme.lookup("plan", "full")
    assert 2 * 2**30 < plan < 14 * 2**30
    assert readme.lookup("plan", "lora") < plan


def test_a_lesson_is_written_anew_in_its_text_alone(tmp_path):
    name = "03_lora:runs.0.settings.batch_size"
    value = readme.recorded(name)
    marked = f"Batches of 0<!-- run:{name} as d -->.\nNext."
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_markdown_cell(marked),
            nbformat.v4.new_code_cell(f"x = 0  # <!-- run:{name} as d -->"),
        ]
    )
    path = tmp_path / "03_x.ipynb"
    nbformat.write(notebook, path)
    readme.write_page(path)
    text, code = nbformat.read(path, as_version=4).cells
    assert text.source == marked.replace("0<", f"{value}<")
    assert code.source.startswith("x = 0")
    path.write_text(path.read_text().replace("03_lora:", "03_none:"))
    with pytest.raises(ValueError, match=r"03_x\.ipynb(.|\n)*03_none"):
        readme.write_page(path)


@pytest.mark.parametrize("stem", STEMS)
def test_writing_a_lesson_whose_numbers_are_right_changes_no_byte(stem, tmp_path):
    original = readme.ROOT / "notebooks" / f"{stem}.ipynb"
    copy = tmp_path / original.name
    copy.write_bytes(original.read_bytes())
    readme.write_page(copy)
    assert copy.read_bytes() == original.read_bytes()


# --- the README ------------------------------------------------------------------


def lesson_rows():
    """{stem: its row} of the README's table of lessons."""
    rows = re.findall(r"^\| \[\d+ · .*\]\(notebooks/(\w+)\.ipynb\).*$", README, re.M)
    lines = [row for row in README.splitlines() if row.startswith("| [")]
    return dict(zip(rows, lines, strict=True))


def test_every_number_of_the_readme_is_right():
    assert check_numbers(README) == []


def test_the_table_of_methods_is_made_from_the_records():
    assert readme.write_methods(README) == README, "run `make readme`"


def test_every_lesson_has_its_row_with_its_seconds_and_its_predicted_memory():
    rows = lesson_rows()
    assert list(rows) == STEMS
    for stem, row in rows.items():
        marker = f"<!-- run:{readme.TIMES}:seconds.{stem} as .0f s -->"
        assert (marker in row) == (stem in TIMED), f"the last timing has no {stem}"
        trains = stem[:2] not in ("00", "01", "10")
        assert ("<!-- plan:" in row) == trains and row.endswith("| – |") != trains


def path_of(result):
    """Name a method's exact match at its best rate as `recorded` does."""
    rate = "" if result.learning_rate is None else f" lr {result.learning_rate:g}"
    return f"{result.record}:exact_match.{result.name}{rate}"


def test_the_row_of_lesson_8_names_the_best_of_the_sweep():
    complete = [r for r in recorded_methods() if r.learning_rate and r.complete]
    best = _order(complete)[0]
    assert f"<!-- run:{path_of(best)} as .0% -->" in lesson_rows()[STEMS[8]]


def test_each_method_has_a_path_to_its_score():
    results = recorded_methods()
    assert {bool(result.learning_rate) for result in results} == {True, False}
    for result in results:
        score = readme.recorded(path_of(result))
        assert score == pytest.approx(result.score), result.name


LORA = MethodResult("LoRA", "lora", 0.01, exact_match=(0.4, 0.6), complete=True)
FULL = replace(LORA, name="full", method="full", learning_rate=3e-4)
PROMPTED = MethodResult(
    "prompting, few-shot", "baseline", exact_match=(0.09,), complete=True, seconds=0.0
)


def test_the_readme_gets_a_section_only_when_all_is_complete():
    section = readme.readme_section([LORA, FULL, PROMPTED])
    assert section.startswith("## Methods compared\n") and section.endswith("\n")
    assert methods_table([LORA, FULL, PROMPTED])._repr_markdown_() in section
    assert f"{BUDGET['steps']} steps of {BUDGET['batch_size']}" in section
    assert check_numbers(section) == []
    assert "on one processor thread;" in section
    on_two = readme.readme_section([LORA, FULL], threads=2)
    assert "on 2 processor threads;" in on_two
    late = replace(FULL, complete=False)
    for few in ([LORA, late, PROMPTED], [LORA, PROMPTED], []):
        assert readme.readme_section(few) == ""


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="methods:begin"):
        readme.write_methods("# Title")


def test_the_methods_are_put_between_their_markers(monkeypatch):
    monkeypatch.setattr(readme, "FAMILIES", ())
    monkeypatch.setattr(readme, "recorded_methods", lambda: ["swept"])
    monkeypatch.setattr(readme, "readme_section", lambda r, threads: f"{r} {threads}\n")
    old = "a\n<!-- methods:begin -->\nold\n<!-- methods:end -->\nc"
    monkeypatch.setattr(records, "load_record", lambda name: {"hardware": {}})
    swept = "['swept'] 1\n"
    new = f"a\n<!-- methods:begin -->\n{swept}<!-- methods:end -->\nc"
    assert readme.write_methods(old) == readme.write_methods(new) == new
    monkeypatch.setattr(readme, "FAMILIES", ("08_none",))  # a family not recorded
    assert "begin -->\n[] 1" in readme.write_methods(old)


def test_the_readme_shows_each_picture_that_is_drawn():
    shown = re.findall(r"\(data/pictures/(\w+)\.png\)", README)
    assert sorted(shown) == sorted(readme.PICTURES)
    for name in readme.PICTURES:
        path = PICTURES / f"{name}.png"
        assert path.stat().st_size > 5e3


def test_the_pictures_that_are_kept_as_text_say_what_they_show_and_are_shown():
    pages = {*readme.ROOT.glob("notebooks/*.ipynb"), readme.ROOT / "README.md"}
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    for path in PICTURES.glob("*.svg"):
        assert path.name in text
        picture = ElementTree.parse(path).getroot()
        said = [picture.findtext(f"{SVG}{part}") for part in ("title", "desc")]
        assert min(map(len, said)) > 20
        # a notebook's page holds the picture itself: its rules must not leave it
        rules = re.findall(r"([^{}]+)\{", picture.findtext(f"{SVG}style", ""))
        assert all(rule.strip().startswith(f"#{path.stem} ") for rule in rules)
        names = [element.get("id") for element in picture.iter() if element.get("id")]
        assert all(name.startswith(path.stem) for name in names)


def test_the_map_has_each_method_in_its_own_colour():
    picture = (PICTURES / "methods.svg").read_text(encoding="utf-8")
    names = re.findall(r'class="name"[^>]*>([^<]+)<', picture)
    keys = [key for key in METHOD_NAMES if f"#methods .{key} " in picture]
    assert sorted(names) == sorted(METHOD_NAMES[key] for key in keys)
    assert len(keys) == 10
    for key in keys:
        assert f"#methods .{key} {{ fill: {METHOD_COLOURS[key]}; }}" in picture
        assert picture.count(f'<circle class="{key}"') == 2
    first = (PICTURES / "map.svg").read_text(encoding="utf-8")  # lesson 0's
    for key in ("baseline", "full", "lora", "prompt", "prefix"):
        assert f"#map .{key} {{ fill: {METHOD_COLOURS[key]}; }}" in first
        assert first.count(f'<circle class="{key}"') == 2
    prefix = (PICTURES / "prefix.svg").read_text(encoding="utf-8")
    assert METHOD_COLOURS["prompt"] in prefix and METHOD_COLOURS["prefix"] in prefix


def test_the_picture_of_prefixes_shows_the_request_of_its_lesson():
    lesson = (readme.ROOT / "notebooks" / "06_prefix_tuning.ipynb").read_text("utf-8")
    [request] = re.findall(r'request = tokenizer\(\\"(.+?)\\"', lesson)
    picture = (PICTURES / "prefix.svg").read_text(encoding="utf-8")
    words = re.findall(r'rotate\(-90\)" text-anchor="end">([^<]+)<', picture)
    assert "".join(words[: len(words) // 2]) == request.replace(" ", "")


# --- the seconds of a full run ---------------------------------------------------


@pytest.fixture
def course(tmp_path, monkeypatch):
    """A finished run of the course, and an empty folder for records."""
    (tmp_path / "runs").mkdir()
    monkeypatch.setattr(records, "runs_folder", lambda: tmp_path / "runs")
    path = tmp_path / "course.json"
    lines = [
        {"lesson": stem, "ok": True, "seconds": 10.0, "result": "well"}
        for stem in STEMS
    ]
    path.write_text(json.dumps({"profile": "cpu", "lessons": lines}))
    return path


def test_times_of_a_full_run_are_kept(course):
    readme.keep_times(course, STEMS)
    record = records.load_record(readme.TIMES)
    assert record["seconds"] == 10.0 * len(STEMS)
    assert "most_bytes" not in record["summary"], "a run on Windows"


def test_the_peak_of_the_largest_lesson_is_kept(course):
    kept = json.loads(course.read_text())
    for i, line in enumerate(kept["lessons"]):
        line["peak_bytes"] = 10 - i
    course.write_text(json.dumps(kept))
    readme.keep_times(course, STEMS)
    assert readme.recorded(f"{readme.TIMES}:most_bytes") == 10
    assert readme.recorded(f"{readme.TIMES}:peak_bytes.{STEMS[2]}") == 8


def test_times_of_half_a_run_are_refused(course):
    kept = json.loads(course.read_text())
    kept["lessons"][-1]["ok"] = False
    course.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="run `make course`"):
        readme.keep_times(course, STEMS)


def half_minutes(seconds):
    """A time as the head of a lesson says it: half minutes, rounded up.

    >>> half_minutes(31), half_minutes(62), half_minutes(196)
    ('about 1 minute', 'about 1½ minutes', 'about 3½ minutes')
    """
    halves = max(2, math.ceil(seconds / 30))
    text = f"{halves // 2}{'½' if halves % 2 else ''}"
    return f"about {text} minute{'s' if halves > 2 else ''}"


@pytest.mark.parametrize("stem", TIMED)
def test_the_head_of_a_lesson_says_the_recorded_time(stem):
    seconds = readme.recorded(f"{readme.TIMES}:seconds.{stem}")
    text = (readme.ROOT / "notebooks" / f"{stem}.ipynb").read_text(encoding="utf-8")
    assert f"| `cpu` | {half_minutes(seconds)} |" in text
