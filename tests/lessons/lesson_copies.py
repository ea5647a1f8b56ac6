"""Make the copy of a lesson that CI executes, and execute it without a network.

In the copy every check cell must first say "unanswered"; then each wrong answer of
the exercise's metadata and the solution take the exercise's place and the check runs
again, expecting "wrong" and "correct". Afterwards variables are as they were, so a
later cell that needs the reader's answer fails.
"""

from __future__ import annotations

import ast
import copy
import os
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat

from maintenance import runner

ROOT = Path(__file__).resolve().parents[2]
GUARD = ROOT / "tests" / "platforms" / "network_guard"
PROXY = "http://" + "127.0.0.1:9"  # nothing listens there
FENCE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
SAVE = "_course_saved = dict(globals())"
RESTORE = """\
for _name in [name for name in globals() if not name.startswith("_")]:
    if _name not in _course_saved:
        del globals()[_name]
globals().update({k: v for k, v in _course_saved.items() if not k.startswith("_")})"""


class BrokenExercise(ValueError):
    """An exercise that cannot be tested: a cell is missing or of another form."""


def check_call(source: str) -> ast.Call:
    """Return the one call `check("N.M", answer, ...)` that a check cell consists of."""
    body = ast.parse(source).body
    call = body[0].value if len(body) == 1 and isinstance(body[0], ast.Expr) else None
    if not isinstance(call, ast.Call) or ast.unparse(call.func) != "check":
        raise BrokenExercise(f"a check cell is one call of check(...), not: {source}")
    return call


def solution_code(source: str) -> str:
    """Return the code of the one fenced Python block of a solution cell."""
    blocks = FENCE.findall(source)
    if len(blocks) != 1:
        raise BrokenExercise(f"a solution has one python block, not {len(blocks)}")
    return blocks[0].rstrip()


def _expect(source: str, verdict: str, after: str) -> str:
    call = check_call(source)
    note = f"exercise {ast.unparse(call.args[0])} expected {verdict!r} after: {after}"
    return (
        f"_verdict = {ast.unparse(call)}\n"
        f"assert _verdict == {verdict!r}, f'{{_verdict!r}}: ' + {note!r}"
    )


def make_copy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Return the copy to execute; raise BrokenExercise where one cannot be tested."""
    cells = {cell.id: cell for cell in notebook.cells}
    result = copy.deepcopy(notebook)
    result.cells = []
    for cell in notebook.cells:
        result.cells.append(copy.deepcopy(cell))
        number = cell.id.removeprefix("check-")
        if cell.cell_type != "code" or not cell.id.startswith("check-"):
            continue
        try:
            exercise = cells[f"exercise-{number}"]
            solution = solution_code(cells[f"solution-{number}"].source)
            wrong = exercise.metadata["course"]["wrong_answers"]
        except KeyError as error:
            raise BrokenExercise(f"{cell.id}: there is no {error}") from error
        result.cells[-1].source = _expect(cell.source, "unanswered", exercise.source)
        added = [SAVE]
        for text in wrong:
            added += [text, _expect(cell.source, "wrong", text)]
        added += [solution, _expect(cell.source, "correct", solution), RESTORE]
        for index, source in enumerate(added):
            new = nbformat.v4.new_code_cell(source)
            new.id = f"{cell.id}-added-{index}"
            result.cells.append(new)
    return result


@dataclass(frozen=True)
class GuardedRun:
    """One execution without a network.

    Attributes:
        notebook: as far as it was executed.
        seconds, processor_s: by the clock, and those that processors computed, which
            company on the machine does not change; 0 where the system does not say.
        failure: which cell failed and why, with the traceback; else empty.
        blocked: the outward connections that were tried, caught errors too.
    """

    notebook: nbformat.NotebookNode
    seconds: float
    processor_s: float
    failure: str
    blocked: list[str]

    @property
    def complaint(self) -> str:
        """Why this run is no success, or the empty string."""
        if self.blocked:
            return "tried to connect outward:\n" + "\n".join(self.blocked)
        return self.failure[-6000:]


def execute(notebook: nbformat.NotebookNode, name: str, folder: Path) -> GuardedRun:
    """Execute a notebook as `make course` does, but with outward connections blocked.

    Args:
        notebook: what to run; its executed form is left in `folder`.
        name: file name without suffix.
        folder: where the copy goes, and where the kernel stands.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.blocked"
    log.unlink(missing_ok=True)
    (folder / f"{name}.start").touch()
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), PROXY)
    environment = {
        key: value
        for key, value in runner.kernel_environment().items()
        if key.lower() not in (*proxies, "no_proxy")
    }
    environment |= proxies | {key.upper(): PROXY for key in proxies}
    environment["no_proxy"] = "localhost,127.0.0.1"
    environment["PYTHONPATH"] = os.pathsep.join([str(GUARD), str(ROOT)])
    environment["COURSE_BLOCKED_LOG"] = str(log)
    computed = _processor_s()
    run = runner.execute(notebook, folder, environment)
    computed = _processor_s() - computed
    nbformat.write(run.notebook, folder / f"{name}.ipynb")
    blocked = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    return GuardedRun(run.notebook, run.seconds, computed, run.details, blocked)


def _processor_s() -> float:
    """Processor seconds of the processes that this one has started and that ended."""
    times = os.times()
    return times.children_user + times.children_system
