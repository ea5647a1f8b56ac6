"""The sweep's methods on the reader's data and model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course_utils.data import SPLITS, DataError, load_examples
from course_utils.evaluation import free_text
from course_utils.models import load_model
from course_utils.parameters import count_parameters
from course_utils.sweep.experiment import METHODS, Experiment, Prompting, run_experiment
from course_utils.sweep.results import (
    MethodResult,
    MethodsTable,
    methods_table,
    recorded_methods,
    result_of,
)

OURS = "home_commands"
ZERO_SHOT = "prompting, zero-shot"


@dataclass(frozen=True)
class OwnComparison:
    """Methods compared on the reader's data; a notebook shows it as a table.

    Attributes:
        results: one a method, in the order asked for.
        sizes: {split: examples there are}.
        as_text: answers were compared as text, not as JSON.
        table: the results as `methods_table` shows them.
        runs: what `run_experiment` returned: losses, answers, metrics.
    """

    results: tuple[MethodResult, ...]
    sizes: dict[str, int]
    as_text: bool
    table: MethodsTable
    runs: tuple[dict[str, Any], ...]

    def _said(self) -> str:
        counts = ", ".join(f"{n:,} {split}" for split, n in self.sizes.items())
        kind = "the reference's text" if self.as_text else "the reference's JSON"
        asked = len(self.runs[0].get("references", []))
        return (
            f"Examples: {counts}. Exact match is {kind}, on {asked} test examples; "
            "one seed, so small differences are noise."
        )

    def __str__(self) -> str:
        return f"{self._said()}\n{self.table}"

    def _repr_markdown_(self) -> str:
        return f"{self._said()}\n\n{self.table._repr_markdown_()}"


def split_sizes(data: str | Path, batch_size: int) -> dict[str, int]:
    """Count the examples of each split, and refuse what cannot be compared on.

    Args:
        data: as `load_examples`.
        batch_size: there must be that many to train on.

    Raises:
        DataError: the data are unreadable, are no prompts with completions, or a
            split is too small; some test completions are JSON objects, others not.
    """
    columns = load_examples(data, "all").column_names
    if missing := {"prompt", "completion"} - set(columns):
        raise DataError(
            f"no {' and no '.join(sorted(missing))} in {columns}",
            expected="records with prompt and completion",
            cure="Write one prompt and one completion from each conversation.",
            file=data,
        )
    sizes = {split: _size(data, split) for split in SPLITS}
    if not all(sizes.values()) or sizes["train"] < batch_size:
        counts = ", ".join(f"{n} {split}" for split, n in sizes.items())
        raise DataError(
            f"too few examples: {counts}",
            expected=f"{batch_size} or more to train on, and one of each other split",
            cure="One file splits 80/10/10 by a hash of the prompt, so 50 examples "
            "fill every split as a rule; or make a folder with train.jsonl, "
            "validation.jsonl and test.jsonl.",
            file=data,
        )
    answers = load_examples(data, "test")["completion"]
    objects = sum(not free_text([answer]) for answer in answers)
    if 0 < objects < len(answers):
        raise DataError(
            f"{objects} of {len(answers)} test completions are JSON objects",
            expected="all of them, compared field by field, or none, compared as text",
            cure="Write the others as JSON objects too, or put them into another file.",
            file=data,
        )
    return sizes


def _size(data: str | Path, split: str) -> int:
    try:
        return len(load_examples(data, split))
    except DataError:  # the file or folder is fine: this split is empty
        return 0


def plan(
    data: str | Path,
    methods: Sequence[str],
    rates: Mapping[str, float],
    **settings: Any,
) -> dict[str, Experiment]:
    """Define one experiment a method, each at its best recorded learning rate.

    Prompt tuning and a prefix start from the course's own task in the sweep; on other
    data they start from the vocabulary and as PEFT does.

    Args:
        data: as `load_examples`.
        methods: names, of `METHODS` or `ZERO_SHOT`; case does not matter.
        rates: {name: learning rate}, before what is recorded.
        settings: of every `Experiment`, besides the data.

    Returns:
        {name of the method: its experiment}, in the order of `methods`.

    Raises:
        ValueError: a name is unknown; says the known ones.
    """
    names = {name.lower(): name for name in [*METHODS, ZERO_SHOT]}
    if unknown := [m for m in [*methods, *rates] if m.lower() not in names]:
        known_names = ", ".join(names.values())
        raise ValueError(f"unknown method {unknown[0]!r}; known: {known_names}")
    recorded = {r.name: r.learning_rate for r in recorded_methods()}
    chosen = recorded | {names[name.lower()]: rate for name, rate in rates.items()}
    settings["data"] = str(data)
    return {
        name: _experiment(name, chosen.get(name), settings)
        for name in dict.fromkeys(names[method.lower()] for method in methods)
    }


def _experiment(name: str, rate: float | None, settings: dict) -> Experiment:
    if name == ZERO_SHOT:
        return Experiment(name, Prompting(), **settings | {"steps": 0, "costs": None})
    method, first_rate, more = METHODS[name]
    rate = rate or first_rate
    if settings["data"] != OURS:
        more = {key: more[key] for key in more if key != "prefix_from"}
        if isinstance(method, dict) and "prompt_tuning_init" in method:
            start = {"prompt_tuning_init": "SAMPLE_VOCAB"}
            method = method | start | {"prompt_tuning_init_text": None}
    return Experiment(f"{name} lr {rate:g}", method, rate, **settings | more)


def compare_on(
    data: str | Path,
    *,
    model: str | None = None,
    methods: Sequence[str] = ("LoRA", "full"),
    steps: int = 20,
    batch_size: int = 4,
    eval_examples: int = 24,
    test_examples: int = 24,
    rates: Mapping[str, float] | None = None,
) -> OwnComparison:
    """Train and compare methods on other data, with another model.

    Each method runs as in the sweep, once, at its best recorded learning rate. Where
    no test completion is a JSON object, answers are compared as text. Where the best
    rate of your model differs, give it in `rates`.

    Args:
        data: a .jsonl file, which is split 80/10/10 by a hash of the prompt; a folder
            with train.jsonl, validation.jsonl and test.jsonl; or a data set's name.
        model: a hub name or a folder; None takes the course's.
        methods: names as in the sweep, such as `"PiSSA"`, or `ZERO_SHOT`, which asks
            the untrained model.
        steps, batch_size: optimiser steps, and examples in each.
        eval_examples, test_examples: for the validation loss, and answers generated.
        rates: {name of a method: learning rate} where the recorded one will not do.

    Raises:
        DataError: the data cannot be used, or there are too few examples.
        ValueError: a method is unknown; says the known ones.
    """
    data = str(data)
    experiments = plan(
        data,
        methods,
        rates or {},
        steps=steps,
        batch_size=batch_size,
        eval_examples=eval_examples,
        test_examples=test_examples,
        base_dtype="float32",
        costs=True,
        model=model,
    )
    if not experiments:
        raise ValueError("no method is named")
    sizes = split_sizes(data, batch_size)
    counts = ", ".join(f"{n:,} {split}" for split, n in sizes.items())
    print(f"{data}: {counts} examples")
    runs = {}
    for name, experiment in experiments.items():
        print(f"{experiment.label}: {experiment.steps} steps of {batch_size}", end="")
        runs[name] = run_experiment(experiment, progress=False)
        print(f" · {runs[name]['seconds']:.0f} s")
    results = {name: result_of(name, [run]) for name, run in runs.items()}
    if "full" in results:
        total = results["full"].trainable_parameters
    else:
        total = count_parameters(load_model(model)).total
    return OwnComparison(
        tuple(results.values()),
        sizes,
        free_text(load_examples(data, "test")["completion"]),
        methods_table(results.values(), total_parameters=total, marked=False),
        tuple(runs.values()),
    )
