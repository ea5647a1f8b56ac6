"""The recorded runs of the lessons: `python -m maintenance.runs 02 [--only rates]`.

Of every lesson where none is named. A run is saved when finished, and not repeated:
stop when you like, and start again; a long run goes on from its last checkpoint. Data
sets freeze when first recorded against.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from course_utils import records
from course_utils.runtime import versions
from course_utils.sweep.experiment import Prompting, run_experiment
from maintenance.cells import source_hash
from maintenance.runs.batch_size import BatchSizes, run_batch_size
from maintenance.runs.card import CardExperiment, NoCard, run_card
from maintenance.runs.classifier import ClassifierExperiment, run_classifier
from maintenance.runs.curves import Curve, run_curve
from maintenance.runs.experiment import run_training
from maintenance.runs.lesson import LessonExperiment, run_lesson
from maintenance.runs.lists import LESSON_RUNS
from maintenance.runs.peft_table import TypeExperiment, run_type
from maintenance.runs.rounding import Rounding, run_rounding
from maintenance.store import hardware, save_record

# Who makes a run: asked of an experiment first, then of its method.
MAKERS: dict[type, Callable[[Any], dict[str, Any]]] = {
    BatchSizes: run_batch_size,
    CardExperiment: run_card,
    ClassifierExperiment: run_classifier,
    Curve: run_curve,
    LessonExperiment: run_lesson,
    TypeExperiment: run_type,
    Prompting: run_experiment,
}


def make_run(experiment: Any) -> dict[str, Any]:
    """Make the run that an experiment of any class of `maintenance.runs` describes."""
    method = getattr(experiment, "method", None)
    if isinstance(method, Rounding):
        return run_rounding(experiment)
    make = MAKERS.get(type(experiment)) or MAKERS.get(type(method), run_training)
    return make(experiment)


def record_family(
    name: str,
    experiments: Sequence[Any],
    *,
    command: str,
    run: Callable[[Any], dict] = make_run,
    say: Callable[[str], Any] = print,
) -> int:
    """Run what is not recorded yet, and save the record after each run.

    A record that was begun on another machine, or with other versions, keeps those;
    each new run then says where it was made. Returns how many runs were made.

    Raises:
        ValueError: another data set than the record was begun on, or several.
    """
    source = _source(name, experiments)
    machine = {"hardware": hardware(), "versions": versions()}
    recorded, begun_on = [], machine
    if name in records.list_records():
        record = records.load_record(name)
        if record["data"] != source:
            raise ValueError(
                f"{name} was recorded against other data ({record['data']}): a changed "
                "set gets a new name, or delete the record to make it anew"
            )
        recorded, begun_on = record["runs"], {key: record[key] for key in machine}
    runs = [_find(recorded, experiment) for experiment in experiments]
    left = [place for place, made in enumerate(runs) if made is None]
    say(f"{name}: {len(runs) - len(left)} of {len(runs)} runs are there")
    for place in left:
        experiment = experiments[place]
        label = f"{experiment.label}, seed {experiment.seed}"
        say(f"{name}: run {place + 1} of {len(runs)} · {label}")
        runs[place] = run(experiment)
        if machine != begun_on:
            runs[place]["machine"] = machine
        finished = [made for made in runs if made]
        record = {"command": command, **begun_on, "data": source, "runs": finished}
        seconds = sum(made["seconds"] for made in finished)
        save_record(name, record | {"seconds": seconds})
    return len(left)


def _source(name: str, experiments: Sequence[Any]) -> dict[str, Any]:
    """The data sets of a family, with their hashes, as a record holds them."""
    sets = {(e.data, getattr(e, "also", None)) for e in experiments}
    if len(sets) != 1:
        raise ValueError(f"{name}: one data set a record, not {sorted(sets, key=str)}")
    data, also = sets.pop()
    source = {"name": data, "sha256": source_hash(data)}
    if also:
        source["also"] = {"name": also, "sha256": source_hash(also)}
    return source


def _find(recorded: Sequence[dict], experiment: Any) -> dict | None:
    identity = experiment.label, experiment.seed, experiment.settings()
    same = (r for r in recorded if (r["label"], r["seed"], r["settings"]) == identity)
    return next(same, None)


def main(arguments: Sequence[str] | None = None) -> None:
    """Record lessons' families, again while what was recorded asks for more runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    choices = ["all", *sorted(LESSON_RUNS)]
    parser.add_argument("lessons", nargs="*", default="all", choices=choices)
    parser.add_argument("--only", default="", help="families whose name contains this")
    options = parser.parse_args(arguments)
    for lesson in LESSON_RUNS if "all" in options.lessons else options.lessons:
        for name, family in LESSON_RUNS[lesson].items():
            made = options.only in name
            while made:
                experiments = family() if callable(family) else family
                command = f"make runs LESSON={lesson}"
                try:
                    made = record_family(name, experiments, command=command)
                except NoCard as reason:
                    print(f"{name}: {reason}")
                    made = 0


if __name__ == "__main__":
    main()
