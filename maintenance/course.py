"""Run the course: every lesson in order, one plain line each, a table at the end.

    python -m maintenance.course --profile cpu [--lesson 02] [--out build]

Each lesson runs in a kernel of this same Python. The executed notebooks, with their
outputs, are left under `<out>/notebooks/`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from course_utils import lessons, runtime

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
CELL_TIMEOUT_S = 900


@dataclass(frozen=True)
class Outcome:
    """How one lesson went: `result` is its headline, or where and why it failed."""

    lesson: str
    ok: bool
    seconds: float
    result: str


def find_lessons(folder: Path = NOTEBOOKS, only: str | None = None) -> list[Path]:
    """Return the lessons' notebooks in order.

    Args:
        folder: where the notebooks are.
        only: two digits (or the start of a name) of one lesson; None means all.

    Raises:
        FileNotFoundError: there is no such lesson, or no lesson at all.
    """
    wanted = only.zfill(2) if only and only.isdigit() else only or ""
    found = sorted(p for p in folder.glob("[0-9][0-9]_*.ipynb"))
    chosen = [p for p in found if p.stem.startswith(wanted)]
    if not chosen:
        there = ", ".join(p.stem for p in found) or "none"
        raise FileNotFoundError(f"no lesson {wanted!r} in {folder}; there are: {there}")
    return chosen


def kernel_manager() -> Any:
    """Return a kernel manager whose kernels are this Python, whatever is installed."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

    class ThisPython(KernelSpecManager):
        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            command = [sys.executable, "-m", "ipykernel_launcher", "--log-level=ERROR"]
            return KernelSpec(
                argv=[*command, "-f", "{connection_file}"],
                display_name="this Python",
                language="python",
            )

    return AsyncKernelManager(kernel_spec_manager=ThisPython())


def kernel_environment() -> dict[str, str]:
    """Return this process's environment, with this same course_utils on the path."""
    package_root = str(Path(__file__).resolve().parents[1])
    path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    found = os.environ | {"PYTHONPATH": path}
    for name in ("COURSE_BUILD", "COURSE_CACHE", "COURSE_MODEL"):
        place = found.get(name)
        if place and (name != "COURSE_MODEL" or Path(place).is_dir()):
            found[name] = os.path.abspath(place)  # kernels stand in another folder
    return found


def describe_failure(notebook: Any, error: Exception) -> str:
    """Say which cell failed (its id and first line) and why, in one line.

    Args:
        notebook: the notebook as far as it was executed.
        error: what nbclient raised.
    """
    where = "before the first cell"
    for cell in notebook.cells:
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        where = f"cell {cell.id} ({cell.source.strip().splitlines()[0]})"
        bad = [o for o in cell.outputs if o.output_type == "error"]
        if bad:
            return f"{where}: {bad[0].ename}: {_one_line(bad[0].evalue)}"
        if cell.execution_count is None:
            break
    why = f"{type(error).__name__}: {_one_line(str(error))}"
    if frames := traceback.extract_tb(error.__traceback__):  # not the lesson's fault
        last = frames[-1]
        why += f" ({Path(last.filename).name}, line {last.lineno}, {last.name})"
    return f"{where}: {why}"


def _one_line(text: str, width: int = 200) -> str:
    line = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", text).split())
    return line if len(line) <= width else line[: width - 1] + "…"


def run_lesson(path: Path, out: Path) -> Outcome:
    """Execute one lesson and keep the executed notebook, also after a failure.

    Args:
        path: the notebook.
        out: the executed copy goes to `out/notebooks/`.
    """
    import nbformat
    from nbclient import NotebookClient

    number = path.stem[:2]
    before = lessons.load_result(number)
    if before:
        (runtime.build_folder() / "results" / f"{number}.json").unlink()
    notebook = nbformat.read(path, as_version=4)
    timeout = notebook.metadata.get("execution", {}).get("timeout", CELL_TIMEOUT_S)
    started, failure = time.perf_counter(), None
    try:
        NotebookClient(
            notebook,
            km=kernel_manager(),
            timeout=timeout,
            shutdown_kernel="immediate",
            resources={"metadata": {"path": str(path.parent)}},
        ).execute(env=kernel_environment(), cleanup_kc=True)  # a kernel left keeps GBs
    except Exception as error:  # whatever a lesson does, the next ones still run
        failure = describe_failure(notebook, error)
    seconds = time.perf_counter() - started
    target = out / "notebooks" / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)
    result = failure or lessons.headline(number) or "ran; it saved no result"
    return Outcome(path.stem, failure is None, seconds, result)


def run_course(
    paths: Sequence[Path], out: Path, say: Callable[[str], None] = print
) -> list[Outcome]:
    """Run the lessons in order, saying one line for each as it ends.

    Args:
        paths: the notebooks.
        out: the folder for executed notebooks.
        say: receives each line.
    """
    outcomes = []
    for path in paths:
        outcome = run_lesson(path, out)
        outcomes.append(outcome)
        sign = "✓" if outcome.ok else "✗"
        say(f"{sign} {outcome.lesson:<22} {outcome.seconds:6.0f} s  {outcome.result}")
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the closing table, in Markdown, with the total time.

    Args:
        outcomes: one for each lesson that was run.

    >>> print(table([Outcome("02_x", True, 61.0, "0 % to 91 %")]))
    | lesson | seconds | result |
    |---|---:|---|
    | 02_x | 61 | 0 % to 91 % |
    | 1 of 1 ran | 61 | 1.0 minutes |
    """
    lines = ["| lesson | seconds | result |", "|---|---:|---|"]
    for o in outcomes:
        result = o.result if o.ok else f"FAILED: {o.result}"
        cell = result.replace("|", "\\|")
        lines.append(f"| {o.lesson} | {o.seconds:.0f} | {cell} |")
    total, good = sum(o.seconds for o in outcomes), sum(o.ok for o in outcomes)
    ran = f"{good} of {len(outcomes)} ran"
    lines.append(f"| {ran} | {total:.0f} | {total / 60:.1f} minutes |")
    return "\n".join(lines)


def save_outcomes(outcomes: Sequence[Outcome], out: Path) -> Path:
    """Write how the lessons went to `out/results/course.json`, and return the file.

    Args:
        outcomes: one for each lesson that was run.
        out: the folder of this run's results.
    """
    path = out / "results" / "course.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [asdict(outcome) for outcome in outcomes]
    course = {"profile": runtime.get_profile().name, "lessons": lines}
    path.write_text(json.dumps(course, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def fetch_model(say: Callable[[str], None] = print) -> None:
    """Make sure that the model is at hand before the first lesson needs it.

    Args:
        say: receives a line that says which model, and the seconds.
    """
    from course_utils import models

    started = time.perf_counter()
    models.release(models.load_model())
    say(f"Model ready: {models.model_name()} ({time.perf_counter() - started:.0f} s)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `python -m maintenance.course`.

    Args:
        arguments: the words after the command; None reads the command line.

    Returns:
        0, or 1 if a lesson failed, or 2 if there is no such lesson.
    """
    parser = argparse.ArgumentParser(prog="maintenance.course", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--profile", choices=runtime.PROFILES, help="default: by hardware"
    )
    parser.add_argument("--lesson", help="two digits: run this one only")
    parser.add_argument("--out", type=Path, help="default: build")
    options = parser.parse_args(arguments)
    # On Windows a redirected output has an encoding that knows no check mark.
    sys.stdout.reconfigure(line_buffering=True, encoding="utf-8", errors="replace")
    # Nor has its event loop what zmq asks for first, and does without.
    warnings.filterwarnings("ignore", "Proactor event loop", RuntimeWarning)
    if options.profile:
        os.environ["COURSE_PROFILE"] = options.profile
    try:
        paths = find_lessons(only=options.lesson)
    except FileNotFoundError as error:
        print(error)
        return 2
    out = options.out or runtime.build_folder()
    print(f"Lessons: {len(paths)} · {runtime.get_profile()} · results go to {out}")
    fetch_model()
    outcomes = run_course(paths, out)
    save_outcomes(outcomes, out)
    print(f"\n{table(outcomes)}")
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
