"""The recorded runs of the lessons: `python -m course_utils.experiments 02`.

    python -m course_utils.experiments 02 --only learning_rates
    python -m course_utils.experiments 02 03 04 --estimate

A run is saved as soon as it is finished, and not repeated: stop when you like, and
start again; a long run goes on from its last checkpoint. Data sets freeze when first
recorded against.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

from course_utils import records
from course_utils.data import data_hash
from course_utils.experiment_card import NoCard
from course_utils.experiment_lists import LESSON_RUNS, best_rate, estimate_seconds
from course_utils.experiment_run import run_experiment
from course_utils.experiment_setup import Experiment, make_model
from course_utils.runtime import hardware, versions

__all__ = [
    "LESSON_RUNS",
    "Experiment",
    "best_rate",
    "estimate_seconds",
    "make_model",
    "record_family",
    "run_experiment",
]


def _find(name: str, runs: Sequence[dict], experiment: Experiment) -> dict | None:
    settings = experiment.settings()
    for run in runs:
        key = run["label"], run["seed"], run["settings"]
        if key == (experiment.label, experiment.seed, settings):
            return run
    return None


def record_family(
    name: str,
    experiments: Sequence[Experiment],
    *,
    command: str,
    run: Callable[[Experiment], dict] = run_experiment,
    say: Callable[[str], Any] = print,
) -> int:
    """Run what is not recorded yet, and save the record after each run.

    A record that was begun on another machine, or with other versions, keeps those;
    each new run then says where it was made.

    Args:
        name: the record's name.
        experiments: its runs, all on the same data set.
        command: what makes the record, for readers.
        run, say: for tests: what makes a run, where progress goes.

    Returns:
        How many runs were made.

    Raises:
        ValueError: the data set has changed since the record was begun, or the
            experiments are on several data sets.
    """
    data = {(e.data, getattr(e, "also", None)) for e in experiments}
    if len(data) != 1:
        found = sorted(data, key=str)
        raise ValueError(f"{name}: one data set a record, found {found}")
    main, also = data.pop()
    source = {"name": main, "sha256": data_hash(main)}
    if also:
        source["also"] = {"name": also, "sha256": data_hash(also)}
    old, here = [], {"hardware": hardware(), "versions": versions()}
    begun_on = here
    if name in records.list_records():
        record = records.load_record(name)
        if record["data"] != source:
            raise ValueError(
                f"{name} was recorded against other data ({record['data']}): a changed "
                "set gets a new name, or delete the record to make it anew"
            )
        old, begun_on = record["runs"], {key: record[key] for key in here}
    found = [_find(name, old, experiment) for experiment in experiments]
    left = [e for e, old_run in zip(experiments, found, strict=True) if not old_run]
    say(f"{name}: {len(experiments) - len(left)} of {len(experiments)} runs are there")
    begun, expected, done = time.perf_counter(), sum(map(estimate_seconds, left)), 0.0
    for place, experiment in enumerate(experiments):
        if found[place] is not None:
            continue
        gone = time.perf_counter() - begun
        rest = (expected - done) * (gone / done if done else 1)
        say(
            f"{name}: run {place + 1} of {len(experiments)} · {experiment.label}, seed "
            f"{experiment.seed} · about {rest / 60:.0f} min left"
        )
        found[place] = run(experiment)
        if here != begun_on:
            found[place]["machine"] = here
        done += estimate_seconds(experiment)
        finished = [one for one in found if one]
        record = {
            "command": command,
            **begun_on,
            "data": source,
            "seconds": sum(one["seconds"] for one in finished),
            "runs": finished,
        }
        records.save_record(name, record)
    return len(left)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's own text.

    Args:
        arguments: words of the command line; None takes the process's own.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lessons", nargs="+", choices=sorted(LESSON_RUNS))
    parser.add_argument("--only", help="families whose name contains this")
    parser.add_argument("--estimate", action="store_true", help="say how long, and end")
    asked = parser.parse_args(arguments)
    for lesson in asked.lessons:
        for name, family in LESSON_RUNS[lesson].items():
            if asked.only and asked.only not in name:
                continue
            if asked.estimate and callable(family):
                print(f"{name}: follows from the records before it")
                continue
            experiments = family() if callable(family) else family
            minutes = sum(map(estimate_seconds, experiments)) / 60
            print(f"{name}: {len(experiments)} runs, about {minutes:.0f} min in all")
            command = f"make runs LESSON={lesson}"
            while not asked.estimate:
                try:
                    made = record_family(name, experiments, command=command)
                except NoCard as reason:
                    print(f"{name}: {reason}")
                    break
                if not made or not callable(family):
                    break
                experiments = family()  # some follow from their own record, and grow


if __name__ == "__main__":
    main()
