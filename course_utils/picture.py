"""The README's pictures and its two tables, made from the recorded runs.

python -m course_utils.picture            draw data/pictures/, fill the tables
python -m course_utils.picture --times    keep the last full run's seconds first
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from course_utils import memory, plotting, records, runtime, widgets
from course_utils.links import ROOT
from course_utils.sweep.results import (
    FAMILIES,
    SPEED,
    order,
    path_of,
    readme_section,
    recorded_methods,
)

TIMES = "course_cpu"
BEST_RUN = "02_wide_and_large"  # the record that lesson 2's figures in the README show
PROPER = {
    "Lora": "LoRA",
    "Pissa": "PiSSA",
    "Qlora": "QLoRA",
    "Text to": "From text to",
    "fine tuning": "fine-tuning",
}
BEST = "best of the sweep"  # in the place of a figure's path
# Lesson; what it builds; the figure of its recorded result; the run to predict on a T4.
LESSONS: tuple[tuple[str, str, str, dict[str, Any] | None], ...] = (
    (
        "00_start_here",
        "a baseline: the best prompt we can write",
        "{00_prompting:exact_match.few-shot} exact match",
        None,
    ),
    (
        "01_text_to_tensors",
        "templates, label masks and the loss, equal to TRL's",
        "every number equal",
        None,
    ),
    (
        "02_full_fine_tuning",
        "a training loop, equal to `Trainer` and `SFTTrainer`",
        "{02_full:exact_match.full} exact match after 150 steps; "
        f"{{{BEST_RUN}:runs.0.metrics.exact_match|1}} with more sentences, "
        "embeddings frozen",
        {"method": "full", "batch_size": 16, "sequence_length": 128},
    ),
    (
        "03_lora",
        "LoRA, equal to PEFT's; save, merge, switch adapters",
        "{03_lora:exact_match.LoRA} exact match",
        {"method": "lora", "batch_size": 16, "sequence_length": 128}
        | {"r": 8, "target_modules": "all-linear"},
    ),
    (
        "04_pissa",
        "PiSSA by SVD, equal to PEFT's; convert it to LoRA",
        "B·A and residual equal to PEFT's",
        {"method": "lora", "batch_size": 16, "sequence_length": 128}
        | {"r": 8, "target_modules": "all-linear"},
    ),
    (
        "05_prompt_tuning",
        "prompt tuning and P-tuning, equal to PEFT's; load a trained prompt",
        "{05_long:exact_match.prompt} exact match",
        {"method": "prompt_tuning", "batch_size": 16, "sequence_length": 128}
        | {"num_virtual_tokens": 20},
    ),
    (
        "06_prefix_tuning",
        "prefix tuning, equal to PEFT's; seven methods on a small classifier",
        "{06_prefix:exact_match.prefix} exact match",
        {"method": "prefix_tuning", "batch_size": 16, "sequence_length": 128}
        | {"num_virtual_tokens": 20},
    ),
    (
        "07_qlora",
        "NF4, equal to bitsandbytes'; QLoRA; a 7B model planned for a T4",
        "after 24 steps {07_qlora:exact_match.QLoRA, NF4}, LoRA "
        "{07_qlora:exact_match.LoRA}",
        {"method": "qlora", "batch_size": 16, "sequence_length": 128}
        | {"r": 8, "target_modules": "all-linear"},
    ),
    (
        "08_choosing_a_method",
        "a fair experiment with eleven methods; the same on your own data",
        f"{{{BEST}}}",
        {"method": "lora", "batch_size": 16, "sequence_length": 128}
        | {"r": 8, "target_modules": "all-linear"},
    ),
)


def share(path: str, digits: int = 0) -> str:
    """Show a recorded share as a percentage that carries its source.

    Args:
        path: as in `records.lookup`.
        digits: after the point.
    """
    return f"{100 * records.lookup(path):.{digits}f} %<!-- run:{path} -->"


def best_recorded() -> str:
    """Name the best trained method of lesson 8's sweep, its score with the source."""
    results = [r for r in recorded_methods() if r.learning_rate and r.complete]
    if not results:
        return "the sweep is being recorded"
    best = order(results)[0]
    name = plotting.display_name(best.name)
    return f"{name} best, {share(path_of(best))} exact match"


def shown(result: str) -> str:
    """A lesson's recorded result, its figures put in.

    Args:
        result: text with `{path}` or `{path|digits}` of figures, or with `{BEST}`.
    """

    def figure(found: re.Match[str]) -> str:
        path, digits = found[1], int(found[2] or 0)
        return best_recorded() if path == BEST else share(path, digits)

    return re.sub(r"\{([^}|]+)(?:\|(\d))?\}", figure, result)


def predicted_gib(plan: dict[str, Any] | None) -> str:
    """Predict the peak of the built-in model's run on a T4, in GiB.

    Args:
        plan: arguments of `memory.t4_plan`; None where nothing is trained.
    """
    if plan is None:
        return "–"
    return f"{memory.t4_plan('smollm2-135m', **plan).total_gib:.1f}"


def table(stems: Sequence[str]) -> str:
    """Make the README's table of lessons, in Markdown.

    Args:
        stems: the lessons that exist, such as `"00_start_here"`.
    """
    lines = [
        "| lesson | you will build | recorded result | on a laptop's CPU |"
        " predicted on a T4 |",
        "|---|---|---|---:|---:|",
    ]
    seconds = {}
    if TIMES in records.list_records():
        runs = records.load_record(TIMES)["runs"]
        seconds = {run["label"]: run["seconds"] for run in runs}
    for stem, builds, result, plan in LESSONS:
        if stem not in stems:
            continue
        number, _, words = stem.partition("_")
        title = f"{int(number)} · {words.replace('_', ' ').capitalize()}"
        for plain, proper in PROPER.items():
            title = title.replace(plain, proper)
        took = f"{seconds[stem]:.0f} s" if stem in seconds else "not recorded"
        gib = predicted_gib(plan)
        lines.append(
            f"| [{title}](notebooks/{stem}.ipynb) | {builds} | {shown(result)} |"
            f" {took} | {gib if plan is None else gib + ' GiB'} |"
        )
    return "\n".join(lines)


def fill(readme: str, stems: Sequence[str]) -> str:
    """Return the README with its tables made anew.

    Args:
        readme: the README's text.
        stems: the lessons that exist.

    Raises:
        ValueError: the markers around a table are missing.
    """
    lesson = f"notebooks/{LESSONS[-1][0]}.ipynb"
    there = {*FAMILIES, SPEED} <= {*records.list_records()}
    swept = recorded_methods() if there else []
    made = records.load_record(SPEED)["hardware"] if swept else {}
    parts = {
        "lessons": table(stems) + "\n",
        "methods": readme_section(swept, lesson=lesson, threads=made.get("threads", 1)),
    }
    for name, text in parts.items():
        first, last = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, begin, rest = readme.partition(first)
        _, end, after = rest.partition(last)
        if not (begin and end):
            raise ValueError(f"README.md has no {first} … {last}")
        readme = f"{before}{first}\n{text}{last}{after}"
    return readme


def lesson_stems() -> list[str]:
    """Return the stems of the lessons in this checkout, in order."""
    folder = ROOT / "notebooks"
    return sorted(path.stem for path in folder.glob("[0-9][0-9]_*.ipynb"))


def keep_times(path: Path) -> None:
    """Record the seconds of a full run of the course, as `make course` left them.

    Args:
        path: `build/results/course.json`.

    Raises:
        ValueError: it was another profile, a lesson failed, or one is missing.
    """
    from maintenance.store import hardware, save_record

    course = json.loads(path.read_text(encoding="utf-8"))
    ran = {line["lesson"]: line for line in course["lessons"] if line["ok"]}
    if course["profile"] != "cpu" or list(ran) != lesson_stems():
        raise ValueError(
            f"{path.name} holds {course['profile']}: {', '.join(ran)}; run `make "
            "course` on the cpu profile, all lessons, without a failure"
        )
    runs = [
        {
            "label": stem,
            "settings": {"profile": "cpu", "result": line["result"]},
            "seed": runtime.DEFAULT_SEED,
            "loss": [],
            "metrics": [],
            "seconds": line["seconds"],
        }
        for stem, line in ran.items()
    ]
    save_record(
        TIMES,
        {
            "command": "make course",
            "hardware": hardware(),
            "versions": runtime.versions(),
            "data": {"name": "all lessons", "sha256": ""},
            "seconds": sum(run["seconds"] for run in runs),
            "runs": runs,
        },
    )


def _learning_curve() -> Any:
    ax = plotting.plot_loss(records.load_record(BEST_RUN)["runs"][0], log=True)
    ax.set_title("Every layer trained, embeddings frozen, recorded: loss by step")
    return ax


def _scores_by_slice() -> Any:
    runs = {
        "prompting, best prompt": records.load_record("00_prompting")["runs"][-1],
        "frozen: embeddings": records.load_record(BEST_RUN)["runs"][0],
    }
    scores = {name: run["metrics"]["by_slice"] for name, run in runs.items()}
    ax = plotting.plot_by_slice(scores)
    ax.set_title("Exact match on held-out sentences, recorded")
    return ax


PICTURES: dict[str, Callable[[], Any]] = {
    "methods": plotting.plot_method_map,
    "learning_curve": _learning_curve,
    "scores_by_slice": _scores_by_slice,
    "memory_planner": widgets.planner_figure,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `python -m course_utils.picture`.

    Args:
        arguments: the words after the command; None reads the command line.
    """
    import matplotlib

    matplotlib.use("Agg")
    asked = sys.argv[1:] if arguments is None else arguments
    if "--times" in asked:
        keep_times(runtime.build_folder() / "results" / "course.json")
    folder = runtime.data_folder() / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        drawn = draw()
        figure = getattr(drawn, "figure", drawn)
        figure.savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
        print(folder / f"{name}.png")
    readme = ROOT / "README.md"
    text = fill(readme.read_text(encoding="utf-8"), lesson_stems())
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
