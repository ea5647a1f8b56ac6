"""The recorded sweep of lesson 08: every method, its own best rate, three seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from course_utils import records
from course_utils.experiment_setup import Experiment

VIRTUAL = 20
SEEDS = (0, 1, 2)
# All methods alike: what is frozen is stored in float32 too, and multiplied in bfloat16
# where the processor can.
BUDGET = {
    "steps": 40,
    "batch_size": 6,
    "eval_every": 10,
    "eval_examples": 48,
    "test_examples": 96,
    "base_dtype": "float32",
    "costs": True,
}
# Seconds are compared apart: in one go, in rounds, with nothing else on the machine.
SPEED = BUDGET | {
    "steps": 6,
    "eval_every": 0,
    "eval_examples": 6,
    "test_examples": 0,
    "costs": None,
}
# Above and below a rate: 1, 3, 10, 30, ...
_PER_DECADE = (1, 3)


def low_rank(lora: dict[str, Any]) -> dict[str, tuple[Any, float, dict]]:
    """LoRA and its kin: {label: (method, first rate to try, further settings)}.

    rsLoRA divides `lora_alpha` by the root of r, so that at r = 64 its factor is the 2
    of the others.
    """
    return {
        "LoRA": (lora, 1e-2, {}),
        "LoRA, attention": (
            lora | {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
            1e-2,
            {},
        ),
        "rsLoRA, r = 64": (
            lora | {"r": 64, "lora_alpha": 16, "use_rslora": True},
            3e-3,
            {},
        ),
        "DoRA": (lora | {"use_dora": True}, 1e-2, {}),
        "PiSSA": (lora | {"init_lora_weights": "pissa"}, 1e-3, {}),
    }


def other_methods(
    lora: dict[str, Any], prompt: dict[str, Any]
) -> dict[str, tuple[Any, float, dict]]:
    """All other trained methods, as `low_rank` has them."""
    p_tuning = {
        "peft_type": "P_TUNING",
        "num_virtual_tokens": VIRTUAL,
        "encoder_hidden_size": 576,
    }
    prefix = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 32}
    return {
        "full": ("full", 3e-4, {}),
        "last 6 layers": ("freeze:24", 1e-3, {}),
        "QLoRA": (lora, 1e-2, {"quantization": "nf4"}),
        "prompt tuning": (prompt, 3e-1, {}),
        "P-tuning": (p_tuning, 3e-3, {}),
        "prefix tuning": (prefix, 3e-2, {"prefix_from": "schema"}),
    }


def neighbour(rate: float, turn: int) -> float:
    """The next rate of 1, 3, 10, 30, ... up (`turn` 1) or down (-1).

    >>> neighbour(0.003, 1), neighbour(0.003, -1)
    (0.01, 0.001)
    """
    place = round(2 * math.log10(rate)) + turn  # 10^(1/2) is 3.16
    return float(f"{_PER_DECADE[place % 2]}e{place // 2}")


def grid(first: float, losses: dict[float, float | None]) -> tuple[list[float], bool]:
    """The rates to try: three, and further ones while the best is at an edge.

    Args:
        first: the rate in the middle of the first three.
        losses: {rate: final validation loss} of what is recorded; None is not a number.

    Returns:
        Rates from the lowest up, and whether all are known with the best inside.

    >>> grid(1e-3, {})
    ([0.0003, 0.001, 0.003], False)
    >>> grid(1e-3, {3e-4: 0.5, 1e-3: 0.6, 3e-3: 0.9})
    ([0.0001, 0.0003, 0.001, 0.003], False)
    >>> grid(1e-3, {3e-4: 0.5, 1e-3: 0.4, 3e-3: None})
    ([0.0003, 0.001, 0.003], True)
    """
    rates = sorted({neighbour(first, -1), first, neighbour(first, 1), *losses})
    if not set(rates) <= losses.keys():
        return rates, False
    best = best_of(losses)
    if best == rates[0]:
        return [neighbour(best, -1), *rates], False
    if best == rates[-1]:
        return [*rates, neighbour(best, 1)], False
    return rates, True


def best_of(losses: dict[float, float | None]) -> float:
    """The rate of the lowest loss; the lowest rate where no loss is a number."""
    return min(
        sorted(losses), key=lambda r: math.inf if losses[r] is None else losses[r]
    )


def recorded_losses(runs: list[dict], label: str) -> dict[float, float | None]:
    """{rate: final validation loss} of a method's runs with the first seed."""
    return {
        run["settings"]["learning_rate"]: run["metrics"]["final_eval_loss"]
        for run in runs
        if run["label"].rpartition(" lr ")[0] == label and run["seed"] == SEEDS[0]
    }


def sweep(
    name: str, methods: dict[str, tuple[Any, float, dict]], more: list[Experiment] = ()
) -> Callable[[], list[Experiment]]:
    """What to run so far: rates around the best, then the best with further seeds.

    The list grows with its record, until every best rate lies inside its grid and has
    all seeds.

    Args:
        name: the record.
        methods: as `low_rank` gives them.
        more: further experiments, run last.
    """

    def experiments() -> list[Experiment]:
        known = name in records.list_records()
        runs = records.load_record(name)["runs"] if known else []
        tried, repeated = [], []
        for label, (method, first, settings) in methods.items():
            losses = recorded_losses(runs, label)
            rates, inside = grid(first, losses)
            found = {
                rate: Experiment(
                    f"{label} lr {rate:g}", method, rate, **BUDGET | settings
                )
                for rate in rates
            }
            tried += found.values()
            if inside:
                best = replace(found[best_of(losses)], forgetting=True)
                repeated += best.seeds(*SEEDS[1:])
        return [*tried, *repeated, *more]

    return experiments


def speed_runs(methods: dict[str, tuple[Any, float, dict]]) -> list[Experiment]:
    """A few steps of each method, twice, the methods in turn.

    Who meets a batch's shape first pays for what PyTorch prepares for it, so the second
    round begins with another method.

    Args:
        methods: as `low_rank` gives them.
    """
    found = []
    for number, seed in enumerate(SEEDS[:2]):
        labels = list(methods)
        turn = number * len(labels) // 2
        for label in labels[turn:] + labels[:turn]:
            method, rate, settings = methods[label]
            found.append(Experiment(label, method, rate, seed=seed, **SPEED | settings))
    return found


def comparison_runs(lora: dict[str, Any], prompt: dict[str, Any]) -> dict[str, Any]:
    """The families of lesson 08.

    Args:
        lora, prompt: fields of the PEFT configurations that all lessons share.
    """
    untrained = [
        Experiment(
            f"prompting, {kind}",
            f"prompt:{kind}",
            steps=0,
            test_examples=BUDGET["test_examples"],
        )
        for kind in ("zero-shot", "few-shot")
    ]
    kin, others = low_rank(lora), other_methods(lora, prompt)
    return {
        "08_low_rank": sweep("08_low_rank", kin),
        "08_others": sweep("08_others", others, untrained),
        "08_speed": speed_runs(kin | others),
    }
