"""Which runs each lesson quotes: edit here what `make runs` makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from course_utils import records
from course_utils.experiment_lists_02 import full_runs
from course_utils.experiment_lists_06 import virtual_runs
from course_utils.experiment_lists_07 import quantized_runs
from course_utils.experiment_lists_08 import comparison_runs
from course_utils.experiment_setup import Experiment

Family = list[Any] | Callable[[], list[Any]]

LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
PISSA = LORA | {"init_lora_weights": "pissa"}
PROMPT = {
    "peft_type": "PROMPT_TUNING",
    "num_virtual_tokens": 20,
    "prompt_tuning_init": "TEXT",
    "prompt_tuning_init_text": (
        'Turn the sentence into one JSON object, "action" first, and answer with '
        "nothing else.\n"
    ),
}
NO_TEXT = {"prompt_tuning_init_text": None, "prompt_tuning_init": "RANDOM"}
P_TUNING = {
    "peft_type": "P_TUNING",
    "num_virtual_tokens": 20,
    "encoder_hidden_size": 576,
}

# Enough to tell settings apart, and short enough to repeat.
SHORT = {"steps": 20, "batch_size": 4, "eval_examples": 32}
GRID = {"steps": 20, "batch_size": 8, "eval_examples": 48, "test_examples": 48}


def best_rate(name: str, prefix: str) -> float:
    """The learning rate of lowest final validation loss in a record.

    Args:
        name: the record.
        prefix: runs whose label begins so take part.

    Raises:
        ValueError: the best rate is at an edge of its grid: extend the grid.
    """
    runs = [r for r in records.load_record(name)["runs"] if _is_of(r, prefix)]
    rates = sorted({run["settings"]["learning_rate"] for run in runs})
    known = [r for r in runs if r["metrics"]["final_eval_loss"] is not None]
    best = min(known, key=lambda run: run["metrics"]["final_eval_loss"])
    rate = best["settings"]["learning_rate"]
    if rate in (rates[0], rates[-1]):
        raise ValueError(
            f"{name}: the best rate of {prefix!r}, {rate:g}, is at an edge of {rates}: "
            "extend the grid"
        )
    return rate


def _is_of(run: dict, prefix: str) -> bool:
    return run["label"] == prefix or run["label"].startswith(f"{prefix} ")


def _rates(label: str, rates: Sequence[float], **settings: Any) -> list[Experiment]:
    return [
        Experiment(f"{label} lr {rate:g}", learning_rate=rate, **settings)
        for rate in rates
    ]


def _lora(label: str, *, learning_rate: float = 1e-3, **changes: Any) -> Experiment:
    return Experiment(label, LORA | changes, learning_rate, **GRID)


def _own_best_rates() -> list[Experiment]:
    found = []
    for label, method in (("LoRA", LORA), ("PiSSA", PISSA)):
        rate = best_rate("04_learning_rates", label)
        one = Experiment(
            label,
            method,
            rate,
            **GRID | {"steps": 30},
            eval_every=10,
            base_dtype="float32",
        )
        found += one.seeds(0, 1, 2)
    return found


def _prompt_starts() -> list[Experiment]:
    """Other starts and lengths at the best rate; what wants its own rate has that."""
    rate = best_rate("05_rates", "prompt")
    vocabulary = NO_TEXT | {"prompt_tuning_init": "SAMPLE_VOCAB"}
    tried = (
        ("vocabulary", PROMPT | vocabulary, rate),
        ("random", PROMPT | NO_TEXT, rate),
        ("random, 10 times the rate", PROMPT | NO_TEXT, 10 * rate),
        ("5 rows", PROMPT | {"num_virtual_tokens": 5}, rate),
        ("50 rows", PROMPT | {"num_virtual_tokens": 50}, rate),
        ("P-tuning lr 0.001", P_TUNING, 1e-3),
        ("P-tuning lr 0.003", P_TUNING, 3e-3),
        ("P-tuning lr 0.01", P_TUNING, 1e-2),
        ("P-tuning lr 0.03", P_TUNING, 3e-2),
    )
    return [
        Experiment(label, method, rate, **SHORT, test_examples=0)
        for label, method, rate in tried
    ]


def _long_prompt() -> list[Experiment]:
    rate = best_rate("05_rates", "prompt")
    return [
        Experiment(
            "prompt",
            PROMPT,
            rate,
            steps=200,
            eval_every=40,
            eval_examples=32,
            keep_adapter="05_prompt_tuning",
        )
    ]


LESSON_RUNS: dict[str, dict[str, Family]] = {
    "00": {
        "00_prompting": [
            Experiment(name, f"prompt:{name}", steps=0, test_examples=None)
            for name in ("zero-shot", "few-shot")
        ],
    },
    "02": full_runs(SHORT),
    "03": {
        "03_learning_rates": _rates(
            "LoRA", (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), method=LORA, **GRID
        ),
        "03_lora": [
            Experiment(
                "LoRA",
                LORA,
                3e-3,
                steps=150,
                batch_size=8,
                schedule="cosine",
                test_examples=None,
                eval_every=25,
                validation_answers=150,
                forgetting=True,
            ),
        ],
        "03_grid": [
            _lora("r = 1", r=1, lora_alpha=2),
            *_lora("r = 8").seeds(0, 1, 2),
            *_lora("r = 64", r=64, lora_alpha=128).seeds(0, 1, 2),
            *_lora("q and v", target_modules=["q_proj", "v_proj"]).seeds(0, 1, 2),
            _lora("rsLoRA, r = 64", r=64, lora_alpha=16, use_rslora=True),
            _lora("LoRA, r = 64, alpha = 16", r=64, lora_alpha=16),
            _lora("DoRA", use_dora=True),
            Experiment("LoRA+", LORA, 3e-4, loraplus_ratio=16.0, **GRID),
        ],
    },
    "04": {
        "04_learning_rates": [
            experiment
            for label, method, more in (("LoRA", LORA, (3e-2,)), ("PiSSA", PISSA, ()))
            for experiment in _rates(
                label,
                (3e-4, 1e-3, 3e-3, 1e-2, *more),
                method=method,
                base_dtype="float32",
                **GRID | {"test_examples": 0},
            )
        ],
        "04_pissa": _own_best_rates,
    },
    "05": {
        "05_rates": _rates(
            "prompt",
            (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0),
            method=PROMPT,
            **SHORT,
            test_examples=0,
        ),
        "05_init": _prompt_starts,
        "05_long": _long_prompt,
    },
}

LESSON_RUNS["06"] = virtual_runs(SHORT, best_rate)
LESSON_RUNS["07"] = quantized_runs(LORA, SHORT)
LESSON_RUNS["08"] = comparison_runs(LORA, PROMPT)

# Seconds on two cores with bfloat16 (measured): a training example, an answer.
EXAMPLE_S = {"full": 0.17, "peft": 0.12, "encoder": 0.02}
ANSWER_S = 0.3


def estimate_seconds(experiment: Experiment) -> float:
    """About how long an experiment takes on two cores, in seconds."""
    kind = "peft" if isinstance(experiment.method, dict) else "full"
    kind = getattr(experiment, "kind", kind)
    cost = experiment.steps * experiment.batch_size * EXAMPLE_S[kind]
    every = experiment.eval_every or experiment.steps or 1
    cost += experiment.steps / every * experiment.eval_examples * EXAMPLE_S[kind] / 3
    answers = 480 if experiment.test_examples is None else experiment.test_examples
    answers += 150 if experiment.forgetting else 0
    return cost + answers * ANSWER_S + 5
