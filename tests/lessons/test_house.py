"""The house rules: the lessons of this stage, the repository, the wheel.

A rule for a lesson stands in `notebook_rules.py`. Here each is first shown to fail on
a small bad notebook, then applied to every lesson.
"""

import copy
import json
import re
import subprocess
import sys
import tomllib

import notebook_rules as rules
import pytest
import yaml
from notebook_rules import PACKAGE, ROOT, Lesson
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from course_utils import lessons as exercises

# The exact lessons of this stage: a folder with fewer or other ones fails.
LESSONS = (
    "00_start_here",
    "01_text_to_tensors",
    "02_full_fine_tuning",
    "03_lora",
    "04_pissa",
    "05_prompt_tuning",
    "06_prefix_tuning",
    "07_qlora",
    "08_choosing_a_method",
    "09_other_adapters",
    "10_beyond_text",
    "11_reading_curves",
    "12_many_tasks",
)


# --- the lessons -----------------------------------------------------------------


def test_the_lessons_of_this_stage_are_there_and_no_others():
    found = tuple(sorted(p.stem for p in (ROOT / "notebooks").glob("*.ipynb")))
    assert found == LESSONS


PRESENT = [stem for stem in LESSONS if (ROOT / "notebooks" / f"{stem}.ipynb").exists()]


@pytest.mark.parametrize("name", rules.RULES)
@pytest.mark.parametrize("stem", PRESENT)
def test_lesson_keeps_the_rule(stem, name):
    lesson = Lesson.read(ROOT / "notebooks" / f"{stem}.ipynb", LESSONS)
    complaints = rules.RULES[name](lesson)
    assert not complaints, f"{stem}: {name}:\n" + "\n".join(complaints)


def cell(name, text, kind="code", **metadata):
    base = {"id": name, "cell_type": kind, "metadata": metadata, "source": text}
    return base | ({"outputs": [], "execution_count": None} if kind == "code" else {})


def exercise_cells(m):
    wrong = {"wrong_answers": ["answer = 0"]}
    solution = "<details><summary>Solution</summary>\n\n```python\nanswer = 1\n```\n"
    return [
        cell(f"text-{m}", "Predict the loss.", "markdown"),
        cell(f"exercise-3-{m}", "answer = ...", course=wrong),
        cell(f"check-3-{m}", f'check("3.{m}", answer)'),
        cell(f"solution-3-{m}", solution + "\n</details>", "markdown"),
    ]


def small_lesson():
    """Return the smallest lesson that keeps every rule, between 02 and 04."""
    badge = rules.badge("03_small")
    title = (
        "[Previous: 2 · Before](02_before.ipynb) · [Next: 4 · After](04_after.ipynb)"
    )
    table = "| `smoke` | 1 s |\n| `cpu` | 2 s |\n| `t4` | not measured |"
    will = "**In this lesson you will**\n\n- see\n- count\n- ask\n\n"
    settings = 'settings = {"smoke": 1, "cpu": 2, "t4": 3}["cpu"]'
    questions = "<details><summary>Why?</summary>So.</details>\n" * 3
    cells = [
        cell("title", f"# 3 · Small\n\n{badge}\n\n{title}", "markdown"),
        cell("goals", will + table, "markdown"),
        cell(
            "setup",
            rules.setup_cell(),
            jupyter={"source_hidden": True},
        ),
        cell("words", "We import.", "markdown"),
        cell("imports", "from course_utils.lessons import check, save_result"),
        cell("settings", settings),
        cell("first", "print(settings)"),
        *(c for m in (1, 2, 3) for c in exercise_cells(m)),
        cell("learned", "## What you learned\n\nTo count.", "markdown"),
        cell("save-result", 'save_result("03", "counted")'),
        cell("check-yourself", questions, "markdown"),
        cell("next", "More is missing.", "markdown"),
    ]
    metadata = {"kernelspec": {"name": "python3"}, "execution": {"timeout": 60}}
    whole = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return Lesson("03_small", whole, ("02_before", "03_small", "04_after"))


@pytest.fixture
def registered(monkeypatch):
    test = exercises.Exercise("3", lambda answer: True, "hint")
    monkeypatch.setattr(exercises, "REGISTER", {f"3.{m}": test for m in (1, 2, 3)})


def test_the_small_lesson_keeps_every_rule(registered):
    complaints = {n: rule(small_lesson()) for n, rule in rules.RULES.items()}
    assert {n: c for n, c in complaints.items() if c} == {}


def put(name, text):
    """Replace a cell's text."""

    def change(lesson):
        lesson.cell(name)["source"] = text

    return change


def add(name, text, kind="code", after="first", **metadata):
    """Add a cell."""

    def change(lesson):
        place = [c["id"] for c in lesson.cells].index(after) + 1
        lesson.cells.insert(place, cell(name, text, kind, **metadata))

    return change


def remove(name):
    """Take a cell out."""
    return lambda lesson: lesson.cells.remove(lesson.cell(name))


def swap(name, old, new):
    """Replace a piece of a cell's text."""

    def change(lesson):
        assert old in lesson.text(name)
        lesson.cell(name)["source"] = lesson.text(name).replace(old, new)

    return change


def mark(name, **values):
    """Set keys of a cell, or of the notebook's metadata where name is None."""

    def change(lesson):
        (lesson.cell(name) if name else lesson.notebook["metadata"]).update(values)

    return change


def lengthen(lesson):
    for c in lesson.cells:
        if c["cell_type"] == "code":
            c["source"] += "\nx = 1" * 6


def fold_long(lesson):
    """Long cells that are folded, beside a short one that is not."""
    for c in lesson.cells:
        if c["cell_type"] == "code" and c["id"] not in {"setup", "first"}:
            c["source"] = "# @title A long cell" + "\nx = 1" * 6
            c["metadata"]["jupyter"] = {"source_hidden": True}


MARKER = "<!-- run:99_none:x as .0% -->"
PYTHON = "```python\nx = 1\n```\n"
BAD = [
    ("stored_clean", mark("first", outputs=[{"output_type": "stream"}]), "outputs"),
    ("stored_clean", mark("first", execution_count=3), "execution count"),
    ("stored_clean", mark(None, widgets={}), "widget state"),
    ("stored_clean", mark(None, execution={}), "timeout"),
    ("stored_clean", mark(None, kernelspec={"name": "venv"}), "python3"),
    ("stored_clean", mark("first", metadata={"execution": {"x": 1}}), "times"),
    ("stable_ids", mark("first", id="First result"), "not a slug"),
    ("stable_ids", mark("first", id="setup"), "used twice"),
    ("stable_ids", mark("first", id="3fa85f64-5717"), "generated"),
    ("short_code", put("first", "x = 1\n" * 26), "26 lines"),
    ("short_code", lengthen, "median"),
    ("short_code", fold_long, None),
    (
        "short_code",
        mark("first", metadata={"jupyter": {"source_hidden": True}}),
        "title",
    ),
    ("short_code", put("first", f"x = '{'a' * 90}'"), "columns"),
    ("short_code", add("fourth", "x = 1"), "4th code cell in a row"),
    ("short_prose", put("words", "word " * 151), "151 words"),
    ("short_prose", put("words", "a" * 151), "151 characters"),
    ("plain_words", put("words", "We simply import."), "'simply'"),
    ("plain_words", put("words", "A cutting-edge method."), "'cutting-edge'"),
    ("plain_words", put("words", "## Go \U0001f680"), "emoji"),
    ("anatomy", remove("goals"), "no cell goals"),
    ("anatomy", remove("learned"), "no cell learned"),
    ("anatomy", add("late", "Bye.", "markdown", after="next"), "end with next"),
    ("title_and_navigation", swap("title", "# 3 ·", "# 4 ·"), "begin '# 3"),
    ("title_and_navigation", swap("title", "blob/main", "blob/dev"), "badge"),
    ("title_and_navigation", swap("title", "04_after", "05_other"), "Next leads"),
    ("title_and_navigation", swap("title", "Previous: 2", "Back: 2"), "Previous"),
    ("title_and_navigation", put("next", "[x](09_none.ipynb)"), "not there"),
    ("goals", swap("goals", "- see\n", ""), "2 points"),
    ("goals", swap("goals", "`t4`", "T4"), "`t4`"),
    ("set_up", swap("setup", "peft>=0.20", "peft>=0.19"), "differs"),
    ("set_up", swap("setup", rules.repository(), "other/course"), "does not clone"),
    ("set_up", mark("setup", metadata={}), "folded"),
    ("imports_and_settings", put("imports", "import re\n" * 11), "11 lines"),
    ("imports_and_settings", put("imports", "x = 1"), "not an import"),
    ("imports_and_settings", put("settings", "steps = 3"), "no dict"),
    ("first_result", put("first", "x = 1"), "nothing is shown"),
    ("exercises_complete", remove("solution-3-2"), "exercise cells are not"),
    ("exercises_complete", put("exercise-3-1", "answer = 1"), "does not end"),
    ("exercises_complete", mark("exercise-3-1", metadata={}), "wrong_answers"),
    ("exercises_complete", put("check-3-1", 'check("3.2", answer)'), "called with"),
    ("exercises_complete", put("check-3-1", "x = 1"), "one call"),
    ("exercises_complete", swap("solution-3-1", "</details>", ""), "not folded"),
    ("exercises_complete", add("x", PYTHON, "markdown"), None),
    ("exercises_complete", swap("solution-3-1", "answer = 1", "x = 1"), "no answer"),
    ("closing", put("learned", "We learned."), "heading"),
    ("closing", put("check-yourself", "Why?"), "0 folded"),
    ("closing", put("next", "https://a.b " * 6), "6 references"),
    ("closing", put("save-result", 'save_result("04", "x")'), "save_result"),
    ("nothing_private", put("first", "open('/home/me/x')"), "machine path"),
    ("nothing_private", put("first", f"t = 'hf_{'a' * 34}'"), "secret"),
    ("nothing_private", put("first", "f(trust_remote_code=True)"), "remote code"),
    ("nothing_private", put("first", "x = 'https://a.b/simple'"), "index"),
    ("nothing_private", put("first", "%pip install x"), "magic"),
    ("nothing_private", put("words", "Use torch==2.1."), "pin"),
    ("headings_once", put("words", "## Twice\n\n## Twice"), "second time"),
    ("headings_once", put("words", "## Words"), None),
    (
        "numbers_have_sources",
        put("words", f"9 %{MARKER}"),
        "99_none",
    ),
    ("numbers_have_sources", put("words", f"`9 %{MARKER}`"), None),
]


@pytest.mark.parametrize(("name", "change", "complaint"), BAD)
def test_each_rule_can_fail(name, change, complaint, registered):
    lesson = copy.deepcopy(small_lesson())
    change(lesson)
    complaints = rules.RULES[name](lesson)
    if complaint is None:
        assert complaints == []
    else:
        assert any(complaint in text for text in complaints), complaints


def test_every_rule_is_shown_to_fail():
    shown = {name for name, _, complaint in BAD if complaint}
    assert shown == set(rules.RULES)


def test_an_exercise_without_a_registered_test_is_found(monkeypatch):
    monkeypatch.setattr(exercises, "REGISTER", {})
    assert len(rules.RULES["exercises_complete"](small_lesson())) == 3


# --- the repository --------------------------------------------------------------


BINARY = {".png", ".svg", ".safetensors"}


def project_files():
    """Return every text file that git would carry, tracked or new."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    paths = [ROOT / name for name in sorted(set(names.split("\0"))) if name]
    assert len(paths) > 20, "not a git checkout"
    return [p for p in paths if p.exists() and p.suffix not in BINARY]


# These hold the patterns and the planted examples.
OWN_EXAMPLES = {
    *("tests/lessons/notebook_rules.py", "tests/lessons/test_house.py"),
    "tests/platforms/test_security.py",
}


def test_no_machine_paths_secrets_or_package_indexes():
    bad = []
    for path in project_files():
        name = path.relative_to(ROOT).as_posix()
        if name not in OWN_EXAMPLES:
            text = path.read_text(encoding="utf-8")
            bad += [f"{name}: {found}" for found in rules.forbidden_text(text)]
    assert not bad, "\n".join(bad)


def test_exact_versions_stand_in_constraints_alone():
    project = rules.pyproject()["project"]
    every = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    for requirement in map(Requirement, every):
        operators = {s.operator for s in requirement.specifier}
        assert operators == {">="}, f"{requirement}: a lower bound and nothing else"


def constraints():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    wanted = [Requirement(ln) for ln in lines if ln.strip() and ln[0] != "#"]
    return {r.name.lower().replace("_", "-"): r for r in wanted}


def test_constraints_are_exact_and_satisfy_pyproject():
    exact = constraints()
    assert all(len(r.specifier) == 1 and "==" in str(r) for r in exact.values())
    assert not any("+" in str(r) for r in exact.values()), "a build of one machine"
    project = rules.pyproject()["project"]
    every = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    for requirement in map(Requirement, every):
        pinned = str(exact[requirement.name].specifier).removeprefix("==")
        assert requirement.specifier.contains(pinned), requirement


def test_the_conda_environment_installs_what_pyproject_asks_for():
    text = (ROOT / "environment.yml").read_text(encoding="utf-8")
    wanted = yaml.safe_load(text)["dependencies"]
    project = rules.pyproject()["project"]
    python = next(w for w in wanted if str(w).startswith("python=")).split("=")[1]
    assert SpecifierSet(project["requires-python"]).contains(f"{python}.0")
    assert "pip" in wanted, "conda needs pip for the pip section"
    (pip,) = [w["pip"] for w in wanted if isinstance(w, dict)]
    assert "-c constraints.txt" in pip
    (editable,) = [line for line in pip if line.startswith("-e ")]
    extras = re.fullmatch(r"-e \.\[([\w,]+)\]", editable)[1].split(",")
    assert set(extras) == set(project["optional-dependencies"])
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f'-e ".[{",".join(extras)}]"' in makefile, "make installs the same"
    others = [w for w in wanted if isinstance(w, str) and w != "pip"]
    assert len(others) == 1, "packages come from pyproject.toml, not from conda"


def test_ci_runs_make_test_in_a_fresh_place():
    script = ROOT / ".ci" / "run"
    lines = script.read_text(encoding="utf-8").splitlines()
    executable = sys.platform == "win32" or script.stat().st_mode & 0o111
    assert executable, ".ci/run is not executable"
    assert lines[-1] == "make test </dev/null"
    assert any(line.startswith("rm -rf .venv") for line in lines)
    assert any("export COURSE_CACHE=" in line for line in lines)


def test_the_workflow_runs_it_on_push_and_monthly_on_three_systems():
    path = ROOT / ".github" / "workflows" / "course.yml"
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    when = workflow[True]  # YAML reads the word "on" as a truth value
    assert {"push", "schedule"} <= set(when)
    (monthly,) = when["schedule"]
    assert monthly["cron"].split()[2] == "1", "the first day of each month"
    jobs = workflow["jobs"]
    systems = {
        name.split("-")[0] for name in jobs["newest"]["strategy"]["matrix"]["os"]
    }
    assert systems == {"ubuntu", "macos", "windows"}
    commands = [step.get("run", "") for job in jobs.values() for step in job["steps"]]
    assert "bash .ci/run" in commands
    assert any(command.startswith("make test-colab") for command in commands)
    used = {
        step["uses"] for job in jobs.values() for step in job["steps"] if "uses" in step
    }
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", name) for name in used)


def test_no_file_is_large():
    large = [p.name for p in project_files() if p.stat().st_size > 4_000_000]
    assert not large


def test_pages_keep_to_plain_words_and_sourced_numbers():
    pages = ("README.md", "CONTRIBUTING.md", "data/README.md", "maintenance/README.md")
    for name in pages:
        path = ROOT / name
        if path.exists():
            text = path.read_text(encoding="utf-8")
            page = {"id": name, "cell_type": "markdown", "source": text}
            lesson = Lesson(name, {"cells": [page]}, ())
            allowed_quotes = rules.prose(text).count("“simply”")
            words = rules.RULES["plain_words"](lesson)
            assert len(words) <= allowed_quotes, words
            assert not rules.check_numbers(text)


def test_pytest_runs_doctests_and_leaves_slow_tests_out():
    with open(ROOT / "pyproject.toml", "rb") as file:
        options = tomllib.load(file)["tool"]["pytest"]["ini_options"]
    assert "--doctest-modules" in options["addopts"]
    assert "not slow" in options["addopts"]
    assert {"course_utils", "maintenance"} <= set(options["testpaths"])


# --- the wheel -------------------------------------------------------------------


def run_python(code, *, cwd=ROOT, arguments=()):
    run = subprocess.run(
        [sys.executable, *arguments, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def installed_wheel(tmp_path_factory):
    """Build the wheel from a copy of the sources and install it far from them."""
    import shutil

    tmp = tmp_path_factory.mktemp("wheel")
    sources, site = tmp / "sources", tmp / "site"
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("course_utils", "data", "maintenance"):
        shutil.copytree(ROOT / name, sources / name, ignore=skip)
    for name in ("pyproject.toml", "LICENSE", "LICENSE-docs", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, sources)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    alone = ["--no-deps", "--no-index"]
    build = [*pip, "wheel", *alone, "--no-build-isolation", "-w", str(tmp)]
    subprocess.run([*build, str(sources)], check=True)
    (wheel,) = tmp.glob("*.whl")
    assert wheel.name == "course_utils-0.1.0-py3-none-any.whl"
    subprocess.run([*pip, "install", *alone, "--target", site, wheel], check=True)
    shutil.rmtree(sources)
    return site


def test_the_wheel_carries_every_data_file(installed_wheel):
    there = installed_wheel / "course_utils" / "_data"
    data = {p.relative_to(ROOT / "data") for p in (ROOT / "data").rglob("*.json*")}
    assert data, "the checkout has no data"
    for name in data:
        assert (there / name).read_bytes() == (ROOT / "data" / name).read_bytes()
    assert (installed_wheel / "course_utils" / "py.typed").exists()
    for path in PACKAGE.rglob("*.py"):
        assert (installed_wheel / path.relative_to(ROOT)).exists(), "see pyproject.toml"


def test_the_wheel_carries_nothing_of_the_maintainers(installed_wheel):
    top = {path.name for path in installed_wheel.iterdir() if path.is_dir()}
    assert {name for name in top if "-" not in name} == {"course_utils"}
    data = installed_wheel / "course_utils" / "_data"
    assert not [p.name for p in data.rglob("*") if p.suffix in (".py", ".pyc")]
    assert not (data / "home_commands" / "skeletons.txt").exists()


def test_the_wheel_loads_every_set_with_no_checkout_around(installed_wheel, tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(installed_wheel)!r})
import json
from course_utils import data, runtime
assert data.__file__.startswith({str(installed_wheel)!r})
assert runtime.data_folder().parts[-1] == "_data"
sizes = {{}}
for name in data._bundled_sets():
    for split in data._split_files(runtime.data_folder() / name, name):
        sizes[name + " " + split] = len(data.load_examples(name, split))
print(json.dumps(sizes))
"""
    sizes = json.loads(run_python(code, cwd=tmp_path, arguments=["-I"]))
    assert all(sizes.values()) and len(sizes) >= 16
    borrowed = {"home_commands_wide test", "home_commands_large validation"}
    assert borrowed | {"instructions/chats train"} <= sizes.keys()
