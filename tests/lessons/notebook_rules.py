"""The house rules for one lesson: each rule takes a Lesson and returns complaints.

`test_house.py` shows on small bad notebooks that each rule can fail, then applies all
of them to every lesson.
"""

from __future__ import annotations

import ast
import json
import re
import statistics
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lesson_copies import BrokenExercise, check_call, solution_code

from course_utils import lessons as exercises
from maintenance import readme

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "course_utils"
REQUIRED = [
    "title",
    "goals",
    "setup",
    "imports",
    "settings",
    "learned",
    "check-yourself",
    "next",
]
PROFILES = {"smoke", "cpu", "t4"}
MAX_LINES, MEDIAN_LINES, MAX_WIDTH, MAX_RUN = 25, 5, 88, 3
MAX_WORDS, MAX_PROSE_WIDTH, MAX_IMPORTS, MAX_REFERENCES = 150, 150, 10, 5
SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
DOTS = "answer = ..."
BANNED = re.compile(
    r"\b(simply|obviously|needless to say|powerful|seamless(ly)?|magic(al|ally)?"
    r"|state-of-the-art|cutting-edge|blazing(ly)?|revolutionary|unleash|supercharge[sd]?"
    r"|game-chang\w+|delve[sd]?|effortless(ly)?|world-class|best-in-class)\b",
    re.IGNORECASE,
)
EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u26ff\u2705\u274c\u2728\ufe0f]")
MACHINE_PATH = re.compile(
    r"(?<![\w.~/-])/(home|Users|root|work|tmp|opt|mnt)/\w|\b[A-Z]:\\\\?[A-Z]\w"
)
SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{30,}|\bsk-[A-Za-z0-9-]{20,}|\bAKIA[0-9A-Z]{16}\b"
    r"|\bgh[pousr]_[A-Za-z0-9]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY"
)
INDEX_HOST = re.compile(
    r"https?://[^\s\"')]*(/simple\b|artifactory|nexus|devpi|mirror)"
    r"|https?://\d+\.\d+\.\d+\.\d+(?!\d*/?['\"])",
    re.IGNORECASE,
)
PIN = re.compile(r"\b[A-Za-z][\w.-]*==\d")
REMOTE_CODE = re.compile(r"trust_remote_code\s*=\s*True")


@dataclass(frozen=True)
class Lesson:
    """A notebook and the place it has among the lessons of this stage."""

    stem: str
    notebook: dict
    order: tuple[str, ...]

    @classmethod
    def read(cls, path: Path, order: tuple[str, ...]) -> Lesson:
        return cls(path.stem, json.loads(path.read_text(encoding="utf-8")), order)

    @property
    def cells(self) -> list[dict]:
        return self.notebook["cells"]

    def of_kind(self, kind: str) -> Iterator[tuple[str, str]]:
        for cell in self.cells:
            if cell["cell_type"] == kind:
                yield cell["id"], source(cell)

    def cell(self, name: str) -> dict | None:
        return next((cell for cell in self.cells if cell["id"] == name), None)

    def text(self, name: str) -> str:
        cell = self.cell(name)
        return source(cell) if cell else ""


Rule = Callable[[Lesson], list[str]]
RULES: dict[str, Rule] = {}


def rule(function: Rule) -> Rule:
    """Put the rule on the list that every lesson is held to."""
    RULES[function.__name__] = function
    return function


def source(cell: dict) -> str:
    """Return a cell's text, whether it is stored as one string or as lines."""
    text = cell["source"]
    return text if isinstance(text, str) else "".join(text)


def folded(cell: dict) -> bool:
    """Say whether a code cell is shown by its title alone."""
    return bool(cell["metadata"].get("jupyter", {}).get("source_hidden"))


def held_lines(text: str) -> list[str]:
    """Return the lines that hold something."""
    return [line for line in text.splitlines() if line.strip()]


def repository() -> str:
    """Return the `owner/name` that `pyproject.toml` gives."""
    return pyproject()["tool"]["course"]["repository"]


def badge(stem: str) -> str:
    """Return the Markdown of a lesson's *Open in Colab* badge."""
    colab = "https://colab.research.google.com"
    return (
        f"[![Open in Colab]({colab}/assets/colab-badge.svg)]"
        f"({colab}/github/{repository()}/blob/main/notebooks/{stem}.ipynb)"
    )


def setup_cell() -> str:
    """Return the set-up cell of lesson 0, which every lesson repeats."""
    path = ROOT / "notebooks" / "00_start_here.ipynb"
    return Lesson.read(path, ()).text("setup")


def prose(markdown: str) -> str:
    """Return what is read: without fenced code, HTML tags and comments, and URLs."""
    text = re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->|</?\w[^>]*>", " ", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return re.sub(r"https?://\S+", "", text)


def own_lines(code: str) -> str:
    """Return code without IPython's magic lines, so that it parses."""
    return re.sub(r"^\s*[%!].*$", "", code, flags=re.MULTILINE)


@rule
def stored_clean(lesson: Lesson) -> list[str]:
    """No outputs, no execution counts, no widget state, metadata that CI needs."""
    bad = []
    for cell in lesson.cells:
        if cell["cell_type"] == "code":
            if cell.get("outputs"):
                bad.append(f"{cell['id']}: has outputs")
            if cell.get("execution_count") is not None:
                bad.append(f"{cell['id']}: has an execution count")
        if "execution" in cell.get("metadata", {}):
            bad.append(f"{cell['id']}: has execution times")
    metadata = lesson.notebook["metadata"]
    if "widgets" in metadata:
        bad.append("has widget state")
    if (lesson.notebook["nbformat"], lesson.notebook["nbformat_minor"]) < (4, 5):
        bad.append("is older than format 4.5")
    if metadata.get("kernelspec", {}).get("name") != "python3":
        bad.append("names no python3 kernel")
    if not metadata.get("execution", {}).get("timeout"):
        bad.append("has no metadata.execution.timeout")
    return bad


@rule
def stable_ids(lesson: Lesson) -> list[str]:
    """Cell ids are slugs, each once."""
    names = [cell.get("id", "") for cell in lesson.cells]
    bad = [f"{n!r}: not a slug" for n in names if not SLUG.fullmatch(n) or len(n) > 64]
    bad += [f"{n}: used twice" for n in sorted(set(names)) if names.count(n) > 1]
    hashes = [n for n in names if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){0,3}.*", n)]
    return bad + [f"{n}: looks generated" for n in hashes]


@rule
def short_code(lesson: Lesson) -> list[str]:
    """Median at most 5 lines, none over 25, width at most 88, three cells in a row.

    The median is that of the cells that a reader sees open.
    """
    code = dict(lesson.of_kind("code"))
    sizes = {name: len(held_lines(text)) for name, text in code.items()}
    bad = [f"{n}: {s} lines" for n, s in sizes.items() if s > MAX_LINES]
    hidden = {name for name in code if folded(lesson.cell(name))}
    titled = {name for name, text in code.items() if text.startswith("# @title ")}
    bad += [f"{name}: folded without a title" for name in sorted(hidden - titled)]
    seen = [size for name, size in sizes.items() if name not in hidden]
    if seen and statistics.median(seen) > MEDIAN_LINES:
        bad.append(f"median of {statistics.median(seen)} lines an open code cell")
    for name, text in code.items():
        widest = max(map(len, text.splitlines()), default=0)
        if widest > MAX_WIDTH:
            bad.append(f"{name}: {widest} columns wide")
        if not text.strip():
            bad.append(f"{name}: empty")
    run = 0
    for cell in lesson.cells:
        run = run + 1 if cell["cell_type"] == "code" else 0
        if run > MAX_RUN:
            bad.append(f"{cell['id']}: the {run}th code cell in a row")
    return bad


@rule
def short_prose(lesson: Lesson) -> list[str]:
    """A Markdown cell has at most 150 words, and one phrase on a line."""
    bad = []
    for name, text in lesson.of_kind("markdown"):
        words = len(re.findall(r"\w[\w'’.,-]*", prose(text)))
        if words > MAX_WORDS:
            bad.append(f"{name}: {words} words")
        for line in prose(text).splitlines():
            if len(line) > MAX_PROSE_WIDTH and not line.lstrip().startswith("|"):
                bad.append(f"{name}: a line of {len(line)} characters: {line[:50]}…")
    return bad


@rule
def plain_words(lesson: Lesson) -> list[str]:
    """No advertising, no "simply", no emoji in headings."""
    bad = []
    for name, text in lesson.of_kind("markdown"):
        bad += [f"{name}: {m.group()!r}" for m in BANNED.finditer(prose(text))]
        for line in text.splitlines():
            if line.startswith("#") and EMOJI.search(line):
                bad.append(f"{name}: emoji in a heading")
    return bad


@rule
def headings_once(lesson: Lesson) -> list[str]:
    """No heading stands twice in a lesson: a reader comes back by it."""
    seen, bad = set(), []
    for name, text in lesson.of_kind("markdown"):
        for line in prose(text).splitlines():
            if line.startswith("#") and line.strip() in seen:
                bad.append(f"{name}: heading {line.strip()!r} for the second time")
            seen.add(line.strip())
    return bad


@rule
def anatomy(lesson: Lesson) -> list[str]:
    """The fixed cells are there, in order, and begin and end the lesson."""
    names = [cell["id"] for cell in lesson.cells]
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        return [f"no cell {name}" for name in missing]
    places = [names.index(name) for name in REQUIRED]
    bad = [] if places == sorted(places) else [f"order is not {' '.join(REQUIRED)}"]
    if names[0] != "title" or names[-1] != "next":
        bad.append("does not begin with title and end with next")
    return bad


@rule
def title_and_navigation(lesson: Lesson) -> list[str]:
    """`# N · Title`, the badge, Previous and Next to the neighbours, none elsewhere."""
    text, number = lesson.text("title"), int(lesson.stem[:2])
    bad = []
    if not re.match(rf"# {number} · \S", text):
        bad.append(f"title does not begin '# {number} · '")
    if badge(lesson.stem) not in text:
        bad.append("title has no Colab badge of this lesson")
    place = lesson.order.index(lesson.stem)
    before, after = lesson.order[:place][-1:], lesson.order[place + 1 :][:1]
    for word, neighbour in (("Previous", before), ("Next", after)):
        found = re.findall(rf"\[{word}: [^\]]+\]\(([^)]+)\)", text)
        if found != [f"{stem}.ipynb" for stem in neighbour]:
            bad.append(f"title: {word} leads to {found}, not to {list(neighbour)}")
    for name, text in lesson.of_kind("markdown"):
        for stem in re.findall(r"\]\((\d\d_\w+)\.ipynb\)", text):
            if stem not in lesson.order:
                bad.append(f"{name}: link to {stem}, which is not there")
    return bad


@rule
def goals(lesson: Lesson) -> list[str]:
    """What you will do (3 to 5 verbs), and time and hardware for each profile."""
    text = lesson.text("goals")
    bad = []
    if "**In this lesson you will**" not in text:
        bad.append("goals: no '**In this lesson you will**'")
    points = [ln for ln in text.splitlines() if re.match(r"[-*] \S", ln)]
    if not 3 <= len(points) <= 5:
        bad.append(f"goals: {len(points)} points, not 3 to 5")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for profile in sorted(PROFILES):
        if not any(f"`{profile}`" in row for row in rows):
            bad.append(f"goals: no row for `{profile}` in its table")
    return bad


@rule
def set_up(lesson: Lesson) -> list[str]:
    """The set-up cell is lesson 0's, names the repository, and is folded."""
    cell = lesson.cell("setup")
    if cell is None:
        return ["no set-up cell"]
    bad = []
    if source(cell) != setup_cell():
        bad.append("setup: differs from lesson 0's")
    if f'repository = "{repository()}"' not in source(cell):
        bad.append(f"setup: does not clone {repository()}; see `make links`")
    if not folded(cell):
        bad.append("setup: not folded")
    return bad


@rule
def imports_and_settings(lesson: Lesson) -> list[str]:
    """Imports in one cell of at most ten lines; settings as a dict by profile."""
    bad, text = [], lesson.text("imports")
    if len(held_lines(text)) > MAX_IMPORTS:
        bad.append(f"imports: {len(held_lines(text))} lines")
    for node in ast.parse(own_lines(text)).body:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            bad.append(f"imports: not an import: {ast.unparse(node)[:40]}")
    trees = ast.walk(ast.parse(own_lines(lesson.text("settings"))))
    keys = [
        {key.value for key in node.keys if isinstance(key, ast.Constant)}
        for node in trees
        if isinstance(node, ast.Dict)
    ]
    if not any(found >= PROFILES for found in keys):
        bad.append("settings: no dict with the keys smoke, cpu and t4")
    return bad


@rule
def first_result(lesson: Lesson) -> list[str]:
    """Within five code cells one shows something: its last line is a call or value."""
    for name, text in list(lesson.of_kind("code"))[:5]:
        body = ast.parse(own_lines(text)).body
        if name not in {"setup", "imports", "settings"} and body:
            last = body[-1]
            loops = isinstance(last, ast.For | ast.With | ast.If)
            if isinstance(last, ast.Expr) or (loops and "print(" in text):
                return []
    return ["nothing is shown within five code cells"]


@rule
def exercises_complete(lesson: Lesson) -> list[str]:
    """At least three exercises, each whole: dots, wrong answers, check, solution."""
    number = int(lesson.stem[:2])
    ids = [cell["id"] for cell in lesson.cells]
    parts = re.compile(r"(exercise|check|solution)-(\d+)-(\d+)")
    found = [m.groups() for m in map(parts.fullmatch, ids) if m]
    count = len({m for _, _, m in found})
    wanted = [
        (kind, str(number), str(m))
        for m in range(1, count + 1)
        for kind in ("exercise", "check", "solution")
    ]
    bad = [] if count >= 3 else [f"{count} exercises, not three or more"]
    if found != wanted:
        return [*bad, f"exercise cells are not {['-'.join(w) for w in wanted]}"]
    for m in range(1, count + 1):
        bad += _exercise(lesson, f"{number}-{m}", f"{number}.{m}")
    return bad


def _exercise(lesson: Lesson, suffix: str, number: str) -> list[str]:
    bad = []
    cell = lesson.cell(f"exercise-{suffix}")
    lines = held_lines(source(cell))
    if not lines or lines[-1].strip() != DOTS:
        bad.append(f"exercise {number}: does not end in '{DOTS}'")
    if not cell["metadata"].get("course", {}).get("wrong_answers"):
        bad.append(f"exercise {number}: metadata has no course.wrong_answers")
    try:
        call = check_call(lesson.text(f"check-{suffix}"))
        given = [ast.unparse(argument) for argument in call.args]
        if given != [repr(number), "answer"]:
            bad.append(f"check {number}: called with {given}")
    except BrokenExercise as error:
        bad.append(f"check {number}: {error}")
    text = lesson.text(f"solution-{suffix}")
    if "<details>" not in text or "</details>" not in text:
        bad.append(f"solution {number}: not folded in <details>")
    try:
        if not re.search(r"\banswer\b\s*=", solution_code(text)):
            bad.append(f"solution {number}: sets no answer")
    except BrokenExercise as error:
        bad.append(f"solution {number}: {error}")
    if number not in exercises.REGISTER:
        bad.append(f"exercise {number}: no test is registered for it")
    return bad


@rule
def closing(lesson: Lesson) -> list[str]:
    """What you learned, three folded questions, the next step, few references."""
    bad = []
    if "## What you learned" not in lesson.text("learned"):
        bad.append("learned: no heading '## What you learned'")
    questions = lesson.text("check-yourself").count("<details>")
    if questions != 3:
        bad.append(f"check-yourself: {questions} folded questions, not 3")
    references = len(re.findall(r"https?://", lesson.text("next")))
    if references > MAX_REFERENCES:
        bad.append(f"next: {references} references, more than {MAX_REFERENCES}")
    code = "\n".join(text for _, text in lesson.of_kind("code"))
    saves = re.findall(r"\bsave_result\(\s*[\"'](\d\d)[\"']", code)
    if saves != [lesson.stem[:2]]:
        bad.append(f"save_result is called for {saves}, not once for this lesson")
    return bad


@rule
def nothing_private(lesson: Lesson) -> list[str]:
    """No machine paths, secrets, pins, remote code, package indexes, magics."""
    bad = []
    for cell in lesson.cells:
        text = source(cell)
        bad += [f"{cell['id']}: {word}" for word in forbidden_text(text)]
        if cell["cell_type"] == "code" and re.search(r"^\s*[%!]", text, re.MULTILINE):
            bad.append(f"{cell['id']}: a magic or shell line")
        if PIN.search(text):
            bad.append(f"{cell['id']}: a version pin: {PIN.search(text).group()}")
    return bad


def forbidden_text(text: str) -> list[str]:
    """Return what may stand in no file of the project."""
    kinds = {
        "machine path": MACHINE_PATH,
        "secret": SECRET,
        "package index": INDEX_HOST,
        "remote code": REMOTE_CODE,
    }
    return [
        f"{name}: {match.group()!r}"
        for name, pattern in kinds.items()
        if (match := pattern.search(text))
    ]


def check_numbers(text: str, *find) -> list[str]:
    """Return a sentence for each marked number that its record does not give."""
    _, wrong, broken = readme.rewrite(text, *find)
    return wrong + broken


@rule
def numbers_have_sources(lesson: Lesson) -> list[str]:
    """A number with a `run:` marker is the number of that record."""
    bad = []
    for name, text in lesson.of_kind("markdown"):
        bad += [f"{name}: {complaint}" for complaint in check_numbers(text)]
    return bad


def pyproject() -> dict:
    """Return the project's settings."""
    with open(ROOT / "pyproject.toml", "rb") as file:
        return tomllib.load(file)
