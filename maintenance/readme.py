"""The numbers of the README and the lessons, and the README's drawn pictures (PNG).

    python -m maintenance.readme           draw data/pictures/, write every number
    python -m maintenance.readme --times   first record how the last full run went

A number carries its source and its form in a comment that no reader sees, as in
`93 %<!-- run:03_lora:exact_match.LoRA as .0% -->`: a path of `recorded`, then a
Python format and, after a space, a unit that is printed and divided by. `plan:lora` in
the place of a record is the memory predicted for a training step on a T4.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from course_utils import memory, plotting, records, runtime, widgets
from course_utils.sweep.experiment import BUDGET, LORA, SEEDS
from course_utils.sweep.results import (
    FAMILIES,
    SPEED,
    MethodResult,
    methods_table,
    recorded_methods,
)
from maintenance.course import find_lessons
from maintenance.store import hardware, save_record

ROOT = Path(__file__).resolve().parents[1]
TIMES = "course_cpu"
LESSON_8 = "notebooks/08_choosing_a_method.ipynb"
BEST_RUN = "02_wide_and_large"  # the record that lesson 2's figures in the README show
# Units of seconds and of bytes, in which the records count.
UNITS = {"s": 1.0, "minutes": 60.0, "kB": 1e3, "MB": 1e6, "GB": 1e9}
UNITS |= {"MiB": 2.0**20, "GiB": 2.0**30}
# Training steps of 16 × 128 tokens of the built-in model, whose memory is predicted.
_SIZE: dict[str, Any] = {key: LORA[key] for key in ("r", "target_modules")}
PLANS: dict[str, dict[str, Any]] = {"full": {}, "lora": _SIZE, "qlora": _SIZE}
PLANS |= dict.fromkeys(("prompt_tuning", "prefix_tuning"), {"num_virtual_tokens": 20})
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_MARKER = re.compile(r"<!--\s*(?P<source>run|plan):(?P<rest>[^>]*?)\s*-->")
_NUMBER = re.compile(r"[-+−]?\d[\d,]*(?:\.\d+)?$")
_EMPHASIS = "*_` \n"


def recorded(path: str) -> Any:
    """Find one figure of a record, as prose names it.

    The path `"03_lora:exact_match.lora"` is the record, then keys into its summary, or
    into itself (`"03_lora:runs.0.metrics.exact_match"`). A key may hold dots.
    Raises RecordError: there is no such record or key; names the keys there are.
    """
    name, _, keys = path.partition(":")
    record = records.load_record(name)
    value, rest = record | record["summary"], keys or "a key"
    while rest:
        is_list = isinstance(value, list)
        known = (
            range(len(value)) if is_list else value if isinstance(value, dict) else ()
        )
        fits = [k for k in map(str, known) if f"{rest}.".startswith(f"{k}.")]
        if not fits:
            there = ", ".join(map(str, known)) or type(value).__name__
            raise records.RecordError(f"{path}: nothing at {rest!r}; there is {there}")
        key = max(fits, key=len)
        value, rest = value[int(key) if is_list else key], rest[len(key) + 1 :]
    return value


def lookup(source: str, path: str) -> Any:
    """What a marker names: `"run"` a path of a record, `"plan"` one of `PLANS`.

    Raises RecordError: there is no such record, key or plan.
    """
    if source == "run":
        return recorded(path)
    if path not in PLANS:
        raise records.RecordError(f"no plan {path!r}; there are {', '.join(PLANS)}")
    settings = {"batch_size": 16, "sequence_length": 128} | PLANS[path]
    return memory.t4_plan("smollm2-135m", path, **settings).total


def show(value: float, form: str) -> str:
    """Write a share, seconds, bytes or a plain number in the form of its marker.

    >>> show(0.9312, ".0%"), show(134515008, ",d"), show(95, ".1f minutes")
    ('93 %', '134,515,008', '1.6 minutes')
    """
    spec, space, unit = form.partition(" ")
    if space and unit not in UNITS:
        raise ValueError(f"no unit {unit!r}; there are {', '.join(UNITS)}")
    text = format(value / UNITS[unit] if space else value, spec)
    return text.replace("%", " %").replace("-", "−") + space + unit


def rewrite(
    text: str, find: Callable[[str, str], Any] = lookup
) -> tuple[str, list[str], list[str]]:
    """Write each marked number of a Markdown text anew; markers in code do not count.

    Returns the new text, sentences about the numbers that were wrong, and sentences
    about the markers that name nothing or have no number before them.
    """
    parts, last, wrong, broken = [], 0, [], []
    masked = _CODE.sub(lambda code: " " * len(code[0]), text)
    for marker in _MARKER.finditer(masked):
        name = f"{marker['source']}:{marker['rest']}"
        path, _, form = marker["rest"].rpartition(" as ")
        shown = text[last : marker.start()].rstrip(_EMPHASIS)
        try:
            if not path:
                raise ValueError("the form is missing, such as 'as .0%'")
            value = find(marker["source"], path)
            numeric = isinstance(value, int | float) and not isinstance(value, bool)
            if not (numeric and math.isfinite(value)):
                raise ValueError(f"it is {value!r}, not a number")
            right = show(value, form)
        except (ValueError, records.RecordError) as error:
            broken.append(f"{name}: {error}")
            continue
        unit = " " + right.partition(" ")[2] if " " in right else ""
        number = _NUMBER.search(shown.removesuffix(unit))
        if number is None or not shown.endswith(unit):
            broken.append(f"{name}: no figure such as {right!r} stands before it")
        elif shown[number.start() :] != right:
            wrong.append(f"{shown[number.start() :]}: {name} is {right}")
            parts += [shown[: number.start()], right]
            last += len(shown)
    return "".join([*parts, text[last:]]), wrong, broken


def write_page(path: Path) -> None:
    """Write the numbers of a page (Markdown) or of a lesson (a notebook) anew."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        notebook, broken = json.loads(text), []
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                new, _, more = rewrite("".join(cell["source"]))
                cell["source"] = new.splitlines(True)
                broken += [f"{cell['id']}: {sentence}" for sentence in more]
        new = json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    else:
        new, _, broken = rewrite(text)
    if broken:
        raise ValueError("\n".join([path.name, *broken]))
    if new != text:
        path.write_text(new, encoding="utf-8")


def readme_section(results: Sequence[MethodResult], *, threads: int = 1) -> str:
    """The section on the sweep and its timing; empty while a method is incomplete."""
    trained = [r for r in results if r.learning_rate]
    if len(trained) < 2 or not all(r.complete for r in results):
        return ""
    steps, batch = BUDGET["steps"], BUDGET["batch_size"]
    on = "one processor thread" if threads == 1 else f"{threads} processor threads"
    return f"""## Methods compared

Each method at its own best learning rate, with {steps} steps of {batch} examples and \
{len(SEEDS)} seeds, scored on {BUDGET["test_examples"]} test sentences: the mean, and \
in brackets the least and the greatest. The prompts were asked once.

{methods_table(results)._repr_markdown_()}

*File* is what has to be kept for each task, *peak* the most that tensors took in one \
step, *training* its seconds on {on}; *general questions* is the \
share still answered.
[Lesson 8]({LESSON_8}) shows how it was measured, and how much of the order is noise.
"""


def write_methods(readme: str) -> str:
    """The README with its comparison of methods made anew."""
    complete = {*FAMILIES, SPEED} <= {*records.list_records()}
    swept = recorded_methods() if complete else []
    machine = records.load_record(SPEED)["hardware"] if swept else {}
    section = readme_section(swept, threads=machine.get("threads", 1))
    first, last = "<!-- methods:begin -->", "<!-- methods:end -->"
    before, begin, rest = readme.partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"README.md has no {first} … {last}")
    return f"{before}{first}\n{section}{last}{after}"


def keep_times(path: Path, stems: Iterable[str]) -> None:
    """Record the seconds and the memory that a full run left in `course.json`."""
    course = json.loads(path.read_text(encoding="utf-8"))
    ran = {line["lesson"]: line for line in course["lessons"] if line["ok"]}
    if course["profile"] != "cpu" or list(ran) != list(stems):
        raise ValueError(
            f"{path.name} holds {course['profile']}: {', '.join(ran)}; run `make "
            "course` on the cpu profile, all lessons, without a failure"
        )
    runs = []
    for stem, line in ran.items():
        settings = {"profile": "cpu", "result": line["result"]}
        run = {"label": stem, "settings": settings, "seed": runtime.DEFAULT_SEED}
        run |= {"loss": [], "metrics": [], "seconds": line["seconds"]}
        if line.get("peak_bytes"):  # not on Windows
            measured = {"peak_bytes": line["peak_bytes"]}
            run |= {"metrics": [*measured], "measured": measured}
        runs.append(run)
    record = {"command": "make course", "hardware": hardware()}
    record |= {"versions": runtime.versions(), "runs": runs}
    record |= {"data": {"name": "all lessons", "sha256": ""}}
    save_record(TIMES, record | {"seconds": sum(run["seconds"] for run in runs)})


def _learning_curve() -> Any:
    ax = plotting.plot_loss(records.load_record(BEST_RUN)["runs"][0], log=True)
    ax.set_title("Every layer trained, embeddings frozen, recorded: loss by step")
    return ax


def _scores_by_slice() -> Any:
    prompted = records.load_record("00_prompting")["runs"][-1]["metrics"]["by_slice"]
    trained = records.load_record(BEST_RUN)["runs"][0]["metrics"]["by_slice"]
    scores = {"prompting, best prompt": prompted, "frozen: embeddings": trained}
    ax = plotting.plot_by_slice(scores)
    ax.set_title("Exact match on held-out sentences, recorded")
    return ax


PICTURES: dict[str, Callable[[], Any]] = {
    "learning_curve": _learning_curve,
    "scores_by_slice": _scores_by_slice,
    "memory_planner": widgets.planner_figure,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m maintenance.readme`."""
    import matplotlib

    matplotlib.use("Agg")
    arguments = sys.argv[1:] if arguments is None else arguments
    lessons = find_lessons()
    if "--times" in arguments:
        results = runtime.build_folder() / "results" / "course.json"
        keep_times(results, [path.stem for path in lessons])
    folder = runtime.data_folder() / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        drawn = draw()
        figure = getattr(drawn, "figure", drawn)
        figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
        print(folder / f"{name}.png")
    readme = ROOT / "README.md"
    text = write_methods(readme.read_text(encoding="utf-8"))
    readme.write_text(text, encoding="utf-8")
    for path in (readme, *lessons):
        write_page(path)


if __name__ == "__main__":
    main()
