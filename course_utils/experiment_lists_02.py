"""The recorded runs of lesson 02: full fine-tuning, short and long."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from course_utils.experiment_setup import Experiment

SPECTRA = tuple(
    f"model.layers.{layer}.{part}.weight"
    for layer in (0, 15, 29)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
)
LONG = Experiment(
    "full, long",
    learning_rate=3e-4,
    steps=240,
    batch_size=16,
    schedule="cosine",
    test_examples=None,
    eval_every=40,
)
# For a card: the training set 28 times over.
MORE = {
    "steps": 1425,
    "batch_size": 32,
    "schedule": "cosine",
    "test_examples": None,
    "eval_every": 95,
    "forgetting": True,
}
# 15,200 sentences, each read once; with FROZEN the embeddings stay as they were.
ONE_PASS = {"data": "home_commands_large", "steps": 950, "eval_every": 95}
FROZEN = {"label": "embeddings frozen", "method": "freeze:0"}
# Both training sets, 16,800 sentences: 1,260 steps of 16 read a fifth of them twice.
BOTH = FROZEN | {
    "label": "embeddings frozen, both sets",
    "data": "home_commands_large",
    "also": "home_commands",
    "steps": 1260,
    "eval_every": 210,
    "eval_examples": 150,
    "forgetting": True,
}
# 19,200 sentences of other patterns, each read once.
WIDE = BOTH | {
    "label": "embeddings frozen, wide set",
    "data": "home_commands_wide",
    "also": None,
    "steps": 1200,
    "eval_every": 200,
}
# Both larger sets, 34,400 sentences, of which 1,350 steps of 16 read five in eight;
# scored on a second test too, written after the first had been read.
WIDE_AND_LARGE = WIDE | {
    "label": "embeddings frozen, wide and large set",
    "also": "home_commands_large",
    "also_test": "home_commands_second_test",
    "steps": 1350,
    "eval_every": 225,
}


def full_runs(short: dict[str, Any]) -> dict[str, list[Experiment]]:
    """The families of lesson 02.

    Args:
        short: the settings that a short run shares with those of other lessons.
    """
    return {
        "02_learning_rates": [
            Experiment(
                f"full lr {rate:g}", learning_rate=rate, **short, test_examples=24
            )
            for rate in (3e-5, 1e-4, 3e-4, 1e-3)
        ],
        "02_full": [
            Experiment(
                "full",
                learning_rate=2e-4,
                steps=150,
                batch_size=8,
                schedule="cosine",
                test_examples=None,
                eval_every=25,
                forgetting=True,
                spectra=SPECTRA,
            ),
        ],
        "02_long": [replace(LONG, forgetting=True)],
        "02_more_data": [replace(LONG, **ONE_PASS)],
        "02_frozen_embeddings": [replace(LONG, **ONE_PASS, **FROZEN)],
        "02_both_sets": [replace(LONG, **BOTH)],
        "02_wide_set": [replace(LONG, **WIDE)],
        "02_wide_and_large": [replace(LONG, **WIDE_AND_LARGE)],
        "02_many_passes": [Experiment("full", "full", 3e-4, **MORE)],
        "02_schedules": [
            Experiment(label, "full", 3e-4, **short, test_examples=0, **settings)
            for label, settings in {
                "constant": {"schedule": "constant", "warmup": 0},
                "linear": {"warmup": 0},
                "linear, warm-up": {},
                "no clipping": {"max_grad_norm": 0},
            }.items()
        ],
        "02_freezing": [
            Experiment(label, method, 3e-4, **short, test_examples=48)
            for label, method in {
                "nothing frozen": "full",
                "first 15 layers frozen": "freeze:15",
                "first 28 layers frozen": "freeze:28",
                "output layer alone": "head",
            }.items()
        ],
        "02_bad_curves": [
            Experiment(label, **short, eval_every=10, test_examples=0, **settings)
            for label, settings in {
                "good": {"learning_rate": 3e-4},
                "rate too high": {"learning_rate": 1e-2},
                "rate too low": {"learning_rate": 1e-6},
                "overfit": {"learning_rate": 3e-4, "train_examples": 16},
                "shuffled labels": {"learning_rate": 3e-4, "shuffle_labels": True},
                "wrong mask": {"learning_rate": 3e-4, "wrong_mask": True},
            }.items()
        ],
    }
