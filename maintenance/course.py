"""Run the course: every lesson in order, one plain line each, a table at the end.

    python -m maintenance.course --profile cpu [--lesson 02] [--out build]

Each lesson runs in a kernel of this same Python. The executed notebooks, with their
outputs, are left under `<out>/notebooks/`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from course_utils import lessons, runtime
from maintenance import runner

NOTEBOOKS = runner.ROOT / "notebooks"


@dataclass(frozen=True)
class Outcome:
    """How one lesson went: `result` is its headline, or where and why it failed.

    `peak_bytes` is the memory that its kernel held, None where that is not known.
    """

    lesson: str
    ok: bool
    seconds: float
    result: str
    peak_bytes: int | None = None

    @property
    def peak(self) -> str:
        return "–" if self.peak_bytes is None else f"{self.peak_bytes / 2**30:.1f} GiB"


def find_lessons(folder: Path = NOTEBOOKS, only: str | None = None) -> list[Path]:
    """The lessons in order, or those whose name begins so; or FileNotFoundError."""
    wanted = only.zfill(2) if only and only.isdigit() else only or ""
    paths = sorted(folder.glob("[0-9][0-9]_*.ipynb"))
    chosen = [path for path in paths if path.stem.startswith(wanted)]
    if not chosen:
        stems = ", ".join(path.stem for path in paths) or "none"
        raise FileNotFoundError(f"no lesson {wanted!r} in {folder}; there are: {stems}")
    return chosen


def run_lesson(path: Path, out: Path) -> Outcome:
    """Execute one lesson and keep it in `out/notebooks/`, also after a failure."""
    import nbformat

    number = path.stem[:2]
    (runtime.build_folder() / "results" / f"{number}.json").unlink(missing_ok=True)
    run = runner.execute(nbformat.read(path, as_version=4), path.parent)
    target = out / "notebooks" / path.name
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(run.notebook, target)
    saved = lessons.load_result(number) or {"headline": "ran; it saved no result"}
    result = run.failure or saved["headline"]
    return Outcome(path.stem, not run.failure, run.seconds, result, run.peak_bytes)


def run_course(paths: Sequence[Path], out: Path) -> list[Outcome]:
    """Run the lessons, print a line for each, and write `out/results/course.json`."""
    outcomes = []
    for path in paths:
        outcome = run_lesson(path, out)
        outcomes.append(outcome)
        line = f"{'✓' if outcome.ok else '✗'} {outcome.lesson:<22}"
        print(f"{line} {outcome.seconds:6.0f} s {outcome.peak:>8}  {outcome.result}")
    lines = [asdict(outcome) for outcome in outcomes]
    course = {"profile": runtime.get_profile().name, "lessons": lines}
    path = out / "results" / "course.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(course, indent=1, ensure_ascii=False), encoding="utf-8")
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """The closing table, in Markdown, with the total time."""
    lines = ["| lesson | seconds | peak memory | result |", "|---|---:|---:|---|"]
    for o in outcomes:
        result = ("" if o.ok else "FAILED: ") + o.result.replace("|", "\\|")
        lines.append(f"| {o.lesson} | {o.seconds:.0f} | {o.peak} | {result} |")
    total, good = sum(o.seconds for o in outcomes), sum(o.ok for o in outcomes)
    ran = f"{good} of {len(outcomes)} ran"
    largest = max(outcomes, key=lambda o: o.peak_bytes or 0).peak
    lines.append(f"| {ran} | {total:.0f} | {largest} | {total / 60:.1f} minutes |")
    return "\n".join(lines)


def fetch_model() -> None:
    """Have the model at hand before the first lesson, which is timed, needs it."""
    from course_utils import models

    models.release(models.load_model())
    print(f"Model ready: {models.model_name()}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return 0, 1 if a lesson failed, 2 if there is no such lesson."""
    parser = argparse.ArgumentParser(prog="maintenance.course", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--profile", choices=runtime.PROFILES)
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
    print(f"\n{table(outcomes)}")
    return 0 if all(outcome.ok for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
