"""The recorded runs of lesson 06: prefixes on the language model, and classifiers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from course_utils.experiment_classifier import ClassifierExperiment
from course_utils.experiment_setup import Experiment

PREFIX = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 32}
# How a prefix begins: method, learning rates tried, where its first values are from.
STARTS: dict[str, tuple[dict, tuple[float, ...], str | None]] = {
    "prefix from text": (PREFIX, (3e-3, 1e-2, 3e-2, 1e-1, 3e-1), "schema"),
    "prefix random": (PREFIX, (3e-2, 1e-1, 3e-1), None),
    "prefix zero": (
        PREFIX | {"init_weights": "zero"},
        (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        None,
    ),
    "prefix projected": (
        PREFIX | {"prefix_projection": True, "encoder_hidden_size": 64},
        (1e-3, 3e-3, 1e-2, 3e-2),
        None,
    ),
}

VIRTUAL = {"num_virtual_tokens": 16}
DEEP = {"peft_type": "PREFIX_TUNING"} | VIRTUAL
# Methods of classification, each with the learning rates tried.
CLASSIFIERS: dict[str, tuple[Any, tuple[float, ...]]] = {
    "frozen": ("head", (1e-3, 3e-3, 1e-2)),
    "prompt": ({"peft_type": "PROMPT_TUNING"} | VIRTUAL, (1e-2, 3e-2, 1e-1, 3e-1)),
    "P-tuning": (
        {"peft_type": "P_TUNING", "encoder_hidden_size": 128} | VIRTUAL,
        (3e-4, 1e-3, 3e-3, 1e-2),
    ),
    "prefix": (DEEP, (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
    "prefix, projected": (
        DEEP | {"prefix_projection": True, "encoder_hidden_size": 128},
        (1e-3, 3e-3, 1e-2),
    ),
    "LoRA": (
        {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        (3e-4, 1e-3, 3e-3, 1e-2),
    ),
    "full": ("full", (3e-5, 1e-4, 3e-4, 1e-3)),
}
HEAD_RATE = 3e-3  # of every head behind a method; a frozen encoder's tries its own
SMALL_START = 0.1  # of PEFT's spread of 1, for virtual tokens that no network makes


def classifier(label: str, rate: float, **changes: Any) -> ClassifierExperiment:
    """One method of `CLASSIFIERS` at one learning rate."""
    method, _ = CLASSIFIERS[label]
    return ClassifierExperiment(
        changes.pop("name", label),
        method,
        rate,
        head_rate=None if method == "head" else HEAD_RATE,
        start_scale=SMALL_START if label in ("prompt", "prefix") else 1.0,
        **changes,
    )


def virtual_runs(
    short: dict[str, Any], best_rate: Callable[[str, str], float]
) -> dict[str, Any]:
    """The families of lesson 06.

    Args:
        short: settings of a short run.
        best_rate: finds the best learning rate of a label in a record.
    """

    def best() -> list[ClassifierExperiment]:
        runs = []
        for label in CLASSIFIERS:
            one = classifier(label, best_rate("06_method_rates", label))
            runs += one.seeds(0, 1, 2)
        return runs

    return {
        "06_prefix": prefixes(short),
        "06_method_rates": [
            classifier(label, rate, name=f"{label} lr {rate:g}")
            for label, (_, rates) in CLASSIFIERS.items()
            for rate in rates
        ],
        "06_methods": best,
    }


def prefixes(short: dict[str, Any]) -> Sequence[Experiment]:
    """One long run of a prefix from text, then each start at its learning rates."""
    long = Experiment(
        "prefix",
        PREFIX,
        3e-2,
        steps=150,
        batch_size=8,
        schedule="cosine",
        test_examples=240,
        eval_every=25,
        prefix_from="schema",
        keep_adapter="06_prefix_tuning",
    )
    return [long] + [
        Experiment(
            f"{label} lr {rate:g}",
            method,
            rate,
            **short,
            test_examples=0,
            prefix_from=source,
        )
        for label, (method, rates, source) in STARTS.items()
        for rate in rates
    ]
