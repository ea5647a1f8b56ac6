"""The house rules: the lessons of this stage, the package's shape, the repository.

A rule for a lesson stands in `notebook_rules.py`. Here each is first shown to fail on
a small bad notebook, then applied to every lesson.
"""

import ast
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

from course_utils import exercises, links, runtime

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
)
MAX_MODULE_LINES = 600
IMPORT_LIMIT_S = 0.050
HEAVY = {
    *("torch", "transformers", "peft", "trl", "datasets", "accelerate", "gguf"),
    *("bitsandbytes", "numpy", "pandas", "matplotlib", "ipywidgets", "safetensors"),
}

# Who may import whom. A module that is not here may not exist; every module may import
# `runtime`. Modules of one family share a public face and a test file.
ARROWS = {
    "files": set(),
    "runtime": set(),
    "heap": set(),
    "links": set(),
    "exercises": set(),
    "lessons": {"exercises"},
    "course": {"lessons", "models"},
    "gguf_files": set(),
    "bundled": {"gguf_files"},
    "pooling": set(),
    "models": {"bundled", "heap", "pooling"},
    "data_errors": set(),
    "data_json": {"data_errors"},
    "data_files": {"data_errors", "data_json"},
    "data_schemas": {"data_errors"},
    "data": {"data_errors", "data_files", "data_schemas"},
    "templates": set(),
    "layout": {"templates"},
    "encoding": {"layout", "templates"},
    "batching": {"encoding"},
    "formatting": {"batching", "encoding", "layout", "templates"},
    "targets": set(),
    "closed_forms": {"targets"},
    "parameter_rows": set(),
    "parameters": {"closed_forms", "parameter_rows", "targets"},
    "classification": set(),
    "memory_request": {"targets", "parameters"},
    "memory_static": {"memory_request", "targets", "parameters"},
    "memory_formula": {"memory_request", "memory_static"},
    "memory_fakes": {"memory_static", "memory_formula"},
    "memory_exact": {"memory_fakes", "memory_request", "memory_static"},
    "memory_answer": {"memory_request", "memory_formula", "memory_exact"},
    "memory_measure": {"heap", "memory_request"},
    "memory": {"memory_answer", "memory_measure", "memory_request", "parameters"},
    "figure_style": set(),
    "figure_confusion": {"figure_style"},
    "figure_curves": {"figure_style"},
    "figure_map": {"figure_style"},
    "figure_predicted": {"figure_style"},
    "figure_prefix": {"figure_style"},
    "figure_own": {"figure_style"},
    "figure_scores": {"figure_own", "figure_style"},
    "figure_methods": {"figure_own", "figure_scores", "figure_style"},
    "figure_text": set(),
    "figure_tokens": {"figure_style", "figure_text"},
    "plotting": {
        *("figure_style", "figure_tokens", "figure_confusion", "figure_prefix"),
        "figure_predicted",
        *("figure_curves", "figure_map", "figure_scores"),
        *("figure_methods", "figure_own"),
    },
    "decoding": set(),
    "comparison": set(),
    "inference": {"comparison", "decoding", "formatting"},
    "scoring": set(),
    "selection": set(),
    "likelihood": {"decoding", "formatting", "selection"},
    "forgetting": {"inference", "likelihood", "selection"},
    "evaluation": {
        *("scoring", "inference", "formatting"),
        *("forgetting", "likelihood", "selection"),
    },
    "packed_batches": {"formatting"},
    "training_speed": {"formatting", "packed_batches"},
    "training_callbacks": {"heap", "training_speed"},
    "training_memory": {"heap", "memory", "memory_answer", "training_callbacks"},
    "training": {
        *("formatting", "evaluation", "heap", "memory", "packed_batches"),
        *("training_callbacks", "training_memory", "training_speed"),
    },
    "records": set(),
    "prose_figures": {"records"},
    "widget_figures": {"parameters", "memory", "plotting"},
    "widgets": {"widget_figures", "parameters", "memory", "plotting"},
    "sweep": {
        *("classification", "data", "evaluation", "figure_style", "formatting"),
        *("memory", "models", "parameters", "records", "scoring", "training"),
        "training_callbacks",
    },
}
EVERYONE_MAY = {"files", "runtime"}
# Tops that run the others: they may import any module, and none imports them.
TOPS = {"picture"}
# These subclass a heavy library's classes, so they import it; only inside functions
# may the others import them.
LAZY = {
    *("memory_exact", "memory_fakes", "pooling", "training_callbacks"),
}
FAMILIES = {
    "data": {"data_errors", "data_files", "data_json", "data_schemas"},
    "formatting": {"batching", "encoding", "layout", "templates"},
    "inference": {"comparison", "decoding"},
    "evaluation": {"forgetting", "likelihood", "selection"},
    "parameters": {"closed_forms", "parameter_rows", "targets"},
    "memory": {
        *("memory_answer", "memory_exact", "memory_fakes", "memory_formula"),
        *("memory_measure", "memory_request", "memory_static"),
    },
    "training": {
        *("packed_batches", "training_callbacks", "training_memory", "training_speed"),
    },
    "plotting": {module for module in ARROWS if module.startswith("figure_")},
    "records": {"prose_figures"},
    "widgets": {"widget_figures"},
    "exercises": {path.stem for path in PACKAGE.glob("exercises_[0-9][0-9].py")},
}
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__")


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
    badge = links.badge(links.repository(), "03_small.ipynb")
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
            links.setup_cell(links.repository()),
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
    ("numbers_have_sources", put("words", "9 %<!-- run:99_none:x -->"), "99_none"),
    ("numbers_have_sources", put("words", "`9 %<!-- run:99_none:x -->`"), None),
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
    monkeypatch.setattr(exercises, "find", lambda number: None)
    assert len(rules.RULES["exercises_complete"](small_lesson())) == 3


# --- the package -----------------------------------------------------------------


def imported(tree, *, module_level_only):
    """Return (top-level package, module of ours or None) of a module's imports."""
    found, stack = [], list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if module_level_only and inner:
            continue
        if isinstance(node, ast.Import):
            for name in (alias.name for alias in node.names):
                ours = name.split(".")[1:2] if name.startswith("course_utils.") else []
                found.append((name.split(".")[0], ours[0] if ours else None))
        elif isinstance(node, ast.ImportFrom):
            source = "course_utils" if node.level else (node.module or "")
            for name in (alias.name for alias in node.names):
                parts = [*source.split("."), name]
                is_ours = parts[0] == "course_utils"
                found.append((parts[0], parts[1] if is_ours else None))
        stack.extend(ast.iter_child_nodes(node))
    return found


def tree_of(module):
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def allowed(module):
    if module in TOPS or module in FAMILIES["exercises"]:
        return set(ARROWS)
    return ARROWS[module] | EVERYONE_MAY


def test_imports_are_read_from_the_tree():
    code = (
        "from __future__ import annotations\nimport re\nfrom course_utils import data\n"
        "if TYPE_CHECKING:\n    import torch\n"
        "def f():\n    import peft\n    from course_utils.models import load_model\n"
    )
    tree = ast.parse(code)
    level = {name for name, _ in imported(tree, module_level_only=True)}
    assert level == {"__future__", "re", "course_utils"}
    ours = {name for _, name in imported(tree, module_level_only=False) if name}
    assert ours == {"data", "models"}


@pytest.mark.parametrize("module", MODULES)
def test_arrows_between_modules(module):
    known = set(ARROWS) | TOPS | FAMILIES["exercises"]
    assert module in known, f"add {module} to ARROWS in tests/test_house.py"
    tree = tree_of(module)
    ours = {name for _, name in imported(tree, module_level_only=False) if name}
    assert ours <= allowed(module), f"{module} may not import {ours - allowed(module)}"
    at_top = {name for _, name in imported(tree, module_level_only=True)}
    assert not at_top & LAZY, f"import {at_top & LAZY} inside a function"


def test_the_table_of_arrows_has_no_cycle():
    seen = set()
    while len(seen) < len(ARROWS):
        ready = {
            m for m, targets in ARROWS.items() if m not in seen and targets <= seen
        }
        assert ready, f"a cycle among {set(ARROWS) - seen}"
        seen |= ready


@pytest.mark.parametrize("module", [m for m in MODULES if m not in LAZY])
def test_nothing_heavy_is_imported_at_the_top(module):
    found = {name for name, _ in imported(tree_of(module), module_level_only=True)}
    outside = found - set(sys.stdlib_module_names) - {"course_utils"}
    assert not outside, f"{module} imports {outside} before anyone asks for it"


def test_importing_every_module_loads_nothing_heavy():
    names = ", ".join(f"course_utils.{m}" for m in MODULES if m not in LAZY)
    code = f"import sys\nimport {names}\nprint(*{HEAVY!r}.intersection(sys.modules))"
    assert run_python(code).split() == []


def test_importing_the_package_takes_no_time():
    code = "import time; t = time.process_time(); import course_utils\n"
    code += "print(time.process_time() - t)"
    times = [float(run_python(code)) for _ in range(5)]
    assert min(times) <= IMPORT_LIMIT_S, times


def run_python(code, *, cwd=ROOT, arguments=()):
    run = subprocess.run(
        [sys.executable, *arguments, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short(module):
    lines = (PACKAGE / f"{module}.py").read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_MODULE_LINES, f"{module}: {lines} lines"


def test_no_drawer_for_odds_and_ends():
    assert not {"utils", "helpers", "common", "misc", "base"} & set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_each_module_has_its_tests(module):
    face = next((f for f, members in FAMILIES.items() if module in members), module)
    files = [ROOT / "tests" / f"test_{name}.py" for name in (module, face)]
    assert any(file.exists() for file in files), f"no {files[0].name}"


def public_functions(tree):
    """Yield (name, node) of a module's public functions and public methods.

    The methods of a subclass are described where its base is.
    """
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name[0] != "_" and not node.bases:
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef) and inner.name[0] != "_":
                    yield f"{node.name}.{inner.name}", inner
        elif isinstance(node, ast.FunctionDef) and node.name[0] != "_":
            yield node.name, node


@pytest.mark.parametrize("module", [m for m in MODULES if m[:10] != "exercises_"])
def test_what_is_public_is_described_and_typed(module):
    tree, bad = tree_of(module), []
    faces = set(MODULES) - set().union(*FAMILIES.values())
    if not ast.get_docstring(tree):
        bad.append("the module has no docstring")
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name[0] != "_":
            bad += [] if ast.get_docstring(node) else [f"{node.name}: no docstring"]
    for name, node in public_functions(tree):
        text = ast.get_docstring(node) or ""
        if not text:
            bad.append(f"{name}: no docstring")
        if node.returns is None:
            bad.append(f"{name}: its result has no type")
        every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        own = [a for a in every if a.arg not in ("self", "cls")]
        bad += [f"{name}({a.arg}): no type" for a in own if a.annotation is None]
        if "." not in name and module in faces:
            words = set(re.findall(r"\w+", text))
            bad += [f"{name}: {a.arg} not described" for a in own if a.arg not in words]
    assert not bad, "\n".join([f"course_utils.{module}", *bad])


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
    *("tests/notebook_rules.py", "tests/test_house.py", "tests/test_security.py"),
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


def test_runtime_and_pyproject_ask_for_the_same_versions():
    asked = map(Requirement, rules.pyproject()["project"]["dependencies"])
    floors = {r.name: str(r.specifier).removeprefix(">=") for r in asked}
    assert floors == runtime.PACKAGES


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


def test_repository_name_stands_where_links_changes_it():
    name = links.repository()
    lessons = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("notebooks/*.ipynb")}
    allowed_names = {*links.FILES, *lessons}
    for path in project_files():
        if name in path.read_text(encoding="utf-8"):
            assert path.relative_to(ROOT).as_posix() in allowed_names


def test_pages_keep_to_plain_words_and_sourced_numbers():
    for name in ("README.md", "CONTRIBUTING.md", "data/README.md"):
        path = ROOT / name
        if path.exists():
            text = path.read_text(encoding="utf-8")
            page = {"id": name, "cell_type": "markdown", "source": text}
            lesson = Lesson(name, {"cells": [page]}, ())
            allowed_quotes = rules.prose(text).count("“simply”")
            words = rules.RULES["plain_words"](lesson)
            assert len(words) <= allowed_quotes, words
            assert not rules.marker_complaints(text)


def test_pytest_runs_doctests_and_leaves_slow_tests_out():
    with open(ROOT / "pyproject.toml", "rb") as file:
        options = tomllib.load(file)["tool"]["pytest"]["ini_options"]
    assert "--doctest-modules" in options["addopts"]
    assert "not slow" in options["addopts"]
    assert "course_utils" in options["testpaths"]


# --- the wheel -------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed_wheel(tmp_path_factory):
    """Build the wheel from a copy of the sources and install it far from them."""
    import shutil

    tmp = tmp_path_factory.mktemp("wheel")
    sources, site = tmp / "sources", tmp / "site"
    skip = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("course_utils", "data"):
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


def test_the_wheel_loads_every_set_with_no_checkout_around(installed_wheel, tmp_path):
    sets = sorted(p.name for p in (ROOT / "data").iterdir() if any(p.glob("*.jsonl")))
    assert "home_commands" in sets
    code = f"""
import sys
sys.path.insert(0, {str(installed_wheel)!r})
import course_utils.data, json
from course_utils import runtime
assert course_utils.__file__.startswith({str(installed_wheel)!r})
assert runtime.data_folder().parts[-1] == "_data"
sets = {sets!r}
sizes = {{}}
for name in sets:
    for path in sorted((runtime.data_folder() / name).glob("*.jsonl")):
        loaded = course_utils.data.load_examples(name, path.stem)
        sizes[name + "/" + path.stem] = len(loaded)
print(json.dumps(sizes))
"""
    sizes = json.loads(run_python(code, cwd=tmp_path, arguments=["-I"]))
    assert len(sizes) >= len(sets) and all(sizes.values())
