"""The recorded runs of lesson 07: what 4 bits do to a model, and to its training."""

from __future__ import annotations

from typing import Any

from course_utils.experiment_setup import Experiment

ROUNDINGS = {
    "int8, by rows": ("int8", None),
    "int4": ("int4", None),
    "FP4": ("fp4", None),
    "NF4": ("nf4", None),
    "NF4, double": ("nf4+dq", None),
    "LoftQ, 1 round, r = 8": ("nf4:8", "loftq:1"),
    "LoftQ, 5 rounds, r = 8": ("nf4:8", "loftq:5"),
    "QPiSSA, r = 8": ("nf4:8", "qpissa"),
    "LoftQ, 1 round, r = 32": ("nf4:32", "loftq:1"),
    "LoftQ, 5 rounds, r = 32": ("nf4:32", "loftq:5"),
    "QPiSSA, r = 32": ("nf4:32", "qpissa"),
}
BASES = {"LoRA": None, "QLoRA, NF4": "nf4", "QLoRA, FP4": "fp4"}
STARTS = {"NF4": None, "NF4, LoftQ": "loftq:1", "NF4, QPiSSA": "qpissa"}


def quantized_runs(
    lora: dict[str, Any], short: dict[str, Any]
) -> dict[str, list[Experiment]]:
    """The families of lesson 07.

    Args:
        lora: fields of the PEFT configuration that all lessons share.
        short: settings of a short run.
    """
    long = {"steps": 24, "batch_size": 8, "eval_every": 12, "eval_examples": 48}
    families: dict[str, list[Experiment]] = {"07_qlora": [], "07_starts": []}
    for label, base in BASES.items():
        one = Experiment(label, lora, 3e-3, test_examples=60, quantization=base, **long)
        families["07_qlora"] += one.seeds(0, 1, 2) if base != "fp4" else [one]
    families["07_rounding"] = [
        Experiment(label, f"round:{name}", steps=0, test_examples=0, start=start)
        for label, (name, start) in ROUNDINGS.items()
    ]
    for label, start in STARTS.items():
        one = Experiment(
            label, lora, 1e-3, **short, test_examples=0, quantization="nf4", start=start
        )
        families["07_starts"] += one.seeds(0, 1, 2)
    return families
