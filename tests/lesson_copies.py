"""Make the copy of a lesson that CI executes, and execute it with pytest --nbmake.

In the copy every check cell must first say "unanswered"; then each wrong answer of
the exercise's metadata and the solution take the exercise's place and the check runs
again, expecting "wrong" and "correct". Afterwards variables are as they were, so a
later cell that needs the reader's answer fails.
"""

from __future__ import annotations

import ast
import copy
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
GUARD = ROOT / "tests" / "network_guard"
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
class Run:
    """One execution: pytest's verdict, its output, blocked connections, seconds.

    Attributes:
        seconds, processor_s: by the clock, and those that processors computed, which
            company on the machine does not change; 0 where the system does not say.
    """

    ok: bool
    output: str
    blocked: list[str]
    seconds: float
    processor_s: float
    notebook: nbformat.NotebookNode

    @property
    def complaint(self) -> str:
        """Why this run is no success, or the empty string."""
        if self.blocked:
            return "tried to connect outward:\n" + "\n".join(self.blocked)
        return "" if self.ok else self.output[-6000:]


def execute(notebook: nbformat.NotebookNode, name: str, folder: Path) -> Run:
    """Execute a notebook with pytest --nbmake, this Python as kernel, no network.

    Args:
        notebook: what to run; its executed form is left in `folder`.
        name: file name without suffix.
        folder: where the copy goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, log = folder / f"{name}.ipynb", folder / f"{name}.blocked"
    log.unlink(missing_ok=True)
    nbformat.write(notebook, path)
    kernel = folder / "jupyter" / "kernels" / "python3" / "kernel.json"
    kernel.parent.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Python 3", "language": "python"}
    kernel.write_text(json.dumps(spec), encoding="utf-8")
    proxy = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "127.0.0.1:9")
    (folder / f"{name}.start").touch()
    environment = (
        {k: v for k, v in os.environ.items() if k.lower() not in (*proxy, "no_proxy")}
        | {k: f"http://{v}" for k, v in proxy.items()}
        | {k.upper(): f"http://{v}" for k, v in proxy.items()}
        | {
            "no_proxy": "localhost,127.0.0.1",
            "PYTHONPATH": os.pathsep.join([str(GUARD), str(ROOT)]),
            "COURSE_BLOCKED_LOG": str(log),
            "JUPYTER_PATH": str(folder / "jupyter"),
        }
    )
    command = [sys.executable, "-m", "pytest", "--nbmake", "--overwrite", "-q"]
    started, computed = time.perf_counter(), _processor_s()
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider", f"--rootdir={ROOT}", str(path)],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    seconds, computed = time.perf_counter() - started, _processor_s() - computed
    blocked = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    executed = nbformat.read(path, as_version=4)
    output = run.stdout + run.stderr
    return Run(run.returncode == 0, output, blocked, seconds, computed, executed)


def _processor_s() -> float:
    """Processor seconds of the processes that this one has started and that ended."""
    times = os.times()
    return times.children_user + times.children_system
