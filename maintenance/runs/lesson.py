"""Recorded runs of what lessons 10 and 12 do in their own cells, with other seeds.

A run executes cells by their id in one namespace, as a reader would, with the settings
that stand here and its own seed; then it calls what those cells have defined.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import string
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

from course_utils.parameters import count_parameters
from course_utils.runtime import set_seed
from course_utils.sweep.experiment import new_run
from maintenance.cells import cells, more_cells
from maintenance.runs.rounding import six_digits
from maintenance.store import compute_metrics

VALIDATION, TEST = 99, 98  # of the seeds that draw words and pictures


@dataclass(frozen=True)
class Part:
    """Cells of a lesson, the settings they need, and what is done after them."""

    stem: str
    defined: str  # ids of cells of which only definitions are taken
    cells: str  # ids of those that are executed
    settings: Mapping[str, Any]
    measure: Callable[[Any, LessonExperiment], dict[str, Any]]


@dataclass(frozen=True)
class LessonExperiment:
    """One run of a part of a lesson, described completely."""

    label: str  # runs that differ in the seed alone share it
    part: str
    method: str
    data: str  # a set, or the cells that draw one
    learning_rate: float | None = None
    place: str | None = None  # among several conditions
    also: str | None = None
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """As a record holds them."""
        values = {k: v for k, v in asdict(self).items() if v is not None}
        del values["label"], values["seed"]
        return values | dict(PARTS[self.part].settings)

    def seeds(self, *seeds: int) -> list[LessonExperiment]:
        """The same experiment with each of these seeds."""
        return [replace(self, seed=seed) for seed in seeds]


def run_lesson(experiment: LessonExperiment) -> dict[str, Any]:
    """Make a run as records hold it; the cells run once for all runs of a seed."""
    begun = time.perf_counter()
    part = PARTS[experiment.part]
    lesson = _prepared(experiment.part, experiment.seed)
    set_seed(experiment.seed)
    run = new_run(experiment) | part.measure(lesson, experiment)
    run["loss"] = [six_digits(loss) for loss in run["loss"]]
    run["metrics"] = compute_metrics(run, run["metrics"])
    return run | {"seconds": time.perf_counter() - begun}


@functools.lru_cache(1)
def _prepared(name: str, seed: int) -> ModuleType:
    part = PARTS[name]
    lesson = cells(part.stem, "imports", "settings")
    lesson.profile = replace(lesson.profile, name="recorded", seed=seed)
    lesson.settings = dict(part.settings)
    lesson.on_demand = SimpleNamespace(use=lambda name: None)  # all are in memory
    # Processor seconds, which company on the machine does not change.
    lesson.time = SimpleNamespace(perf_counter=time.process_time)
    set_seed(seed)
    more_cells(lesson, part.stem, *part.defined.split(), definitions=True)
    *before, last = part.cells.split()
    with contextlib.redirect_stdout(io.StringIO()):
        more_cells(lesson, part.stem, *before)
        if hasattr(lesson, "model"):
            lesson.model.eval()  # as the lesson's own training leaves it
        return more_cells(lesson, part.stem, last)


def _scored(model: Any, losses: list, validation: dict, test: dict) -> dict[str, Any]:
    """Teacher-forced: a word is right where each letter is, a picture as its class."""
    import torch

    with torch.no_grad():
        loss = model(**validation).loss.item()
        right = model(**test).logits.argmax(-1) == test["labels"]
    right = right.reshape(len(right), -1).all(1)
    return {
        "loss": losses,
        "eval_loss": [[len(losses), six_digits(loss)]],
        "trainable_parameters": count_parameters(model).trainable,
        "measured": {"right": right.sum().item(), "asked": len(right)},
        "metrics": ["final_loss", "final_eval_loss", "share_right"],
    }


def _words(lesson: Any, run: LessonExperiment) -> dict[str, Any]:
    model, losses = lesson.teach(run.method, run.learning_rate)
    n = lesson.settings["words"]
    sets = [lesson.rows_of("falling", n, seed) for seed in (VALIDATION, TEST)]
    return _scored(model, losses, *sets)


def _pictures(lesson: Any, run: LessonExperiment) -> dict[str, Any]:
    amount, likeness = run.place.split(", ")
    turn = {"alike": 0.0, "unlike": math.pi / 2}[likeness]
    much, test = lesson.settings["much"], lesson.settings["test"]

    def draw(n: int, seed: int) -> dict[str, Any]:
        return lesson.draw_pictures(string.digits, n, seed, turn=turn)

    pictures = draw({"few": 30, "many": much}[amount], 5)
    model, losses = lesson.adapt(run.method, pictures, run.learning_rate)
    return _scored(model, losses, draw(test, VALIDATION), draw(test, TEST))


def _combined(lesson: Any, run: LessonExperiment) -> dict[str, Any]:
    with lesson.torch.no_grad():
        errors, norms = zip(*lesson.squares(f"by {run.method}"), strict=True)
    measured = {"squared_error": [*map(six_digits, errors)]}
    measured["squared_norm"] = [*map(six_digits, norms)]
    return {"measured": measured, "metrics": ["weight_error"]}


def _switched(lesson: Any, run: LessonExperiment) -> dict[str, Any]:
    ways = {"mixed_s": lesson.in_one_batch, "switching_s": lesson.switching}
    measured = {name: lesson.seconds[way] for name, way in ways.items()}
    return {"measured": measured, "metrics": ["switching_ratio"]}


T5 = {"sort": 200, "task": 150, "words": 500}
ADVICE = {"letters": 200, "digits": 60, "much": 2000, "test": 500}
FEW_ROWS = {"steps": 6, "rows": 1, "tokens": 80}
TIMED = {"rows": 2, "new": 6, "rounds": 7, "tokens": 80}
ADAPTERS = "my-task tasks base add-adapters layer-look"
PARTS = {
    "words": Part("10_beyond_text", "fit t5 words shift", "write four", T5, _words),
    "pictures": Part(
        "10_beyond_text",
        "train-head freeze fit words draw vit pretrain ways",
        "faces pretrain-run",
        ADVICE,
        _pictures,
    ),
    "combining": Part(
        "12_many_tasks",
        "",
        f"{ADAPTERS} learn train combine-peft combine-errors",
        FEW_ROWS,
        _combined,
    ),
    "switching": Part(
        "12_many_tasks",
        "",
        f"{ADAPTERS} learn serve speed speed-run",
        TIMED,
        _switched,
    ),
}
