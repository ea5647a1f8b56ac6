"""What the sweep found: read from records, tabled, compared; and on own data."""

import math

import pytest

from course_utils import (
    records,
)
from course_utils.method_results import (
    recorded_methods,
)

RIGHT = ['{"a": 1}', '{"a": 2}', '{"a": 3}', '{"a": 4}']


def made_up(label, rate, seed, loss, right, **more):
    """A run as `run_experiment` makes it, with `right` of four answers right."""
    answers = RIGHT[:right] + ["?"] * (4 - right)
    costs = {"train_seconds": 10.0 + seed, "peak_bytes": 2**20, "adapter_bytes": 2000}
    return {
        "label": f"{label} lr {rate:g}",
        "settings": {"learning_rate": rate, "steps": 40, "batch_size": 6},
        "seed": seed,
        "loss": [1.0],
        "eval_loss": [[10, 0.5 + seed / 10], [40, loss]],
        "metrics": ["final_eval_loss", "exact_match", "field_f1", "by_slice"]
        + ["by_field"],
        "measured": costs,
        "trainable_parameters": 500,
        "tokens_per_s": 100.0,
        "predictions": answers,
        "references": RIGHT,
        "slices": ["easy", "easy", "hard", "hard"],
        "seconds": 20.0,
    } | more


def general(after):
    return {
        "general_questions": {
            "before": {"loss": 1.0, "answer_share": 0.5},
            "after": {"loss": 1.0, "answer_share": after},
        }
    }


LORA_RUNS = [
    made_up("LoRA", 1e-3, 0, 0.5, 1),
    made_up("LoRA", 1e-2, 0, 0.30, 2),
    made_up("LoRA", 3e-2, 0, math.nan, 0),
    made_up("LoRA", 1e-2, 1, 0.34, 3, measured=general(0.4) | {"train_seconds": 30.0}),
    made_up("LoRA", 1e-2, 2, 0.32, 4, measured=general(0.2) | {"train_seconds": 40.0}),
]
UNTRAINED = made_up("", 1, 0, 1.0, 1) | {
    "label": "prompting, few-shot",
    "settings": {"learning_rate": 1e-4, "steps": 0, "batch_size": 8},
    "loss": [],
    "eval_loss": [],
    "metrics": ["exact_match", "field_f1", "by_slice"],
    "measured": {"test_seconds": 3.0},
    "trainable_parameters": 0,
}
del UNTRAINED["tokens_per_s"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Records in a folder of this test's own."""
    monkeypatch.setattr(records, "data_folder", lambda: tmp_path)
    return tmp_path


def save(name, runs):
    source = {"name": "home_commands", "sha256": ""}
    top = {"command": "make runs", "hardware": {}, "versions": {}, "data": source}
    records.save_record(name, top | {"seconds": 1.0, "runs": runs})


def test_a_method_is_read_at_its_best_rate_with_all_its_seeds(folder):
    save("08_low_rank", LORA_RUNS)
    save("08_others", [UNTRAINED])
    lora, untrained = recorded_methods()
    assert (lora.name, lora.method, lora.learning_rate) == ("LoRA", "lora", 1e-2)
    assert lora.rates == {
        1e-3: (0.5, 0.25, pytest.approx(0.4)),
        1e-2: (0.30, 0.5, pytest.approx(2 * 2 / 6)),
        3e-2: (None, 0.0, 0.0),
    }
    assert lora.exact_match == (0.5, 0.75, 1.0) and lora.score == 0.75
    assert lora.eval_loss == (0.30, 0.34, 0.32)
    assert lora.early_loss == pytest.approx(0.6)
    assert lora.by_slice == {"easy": 1.0, "hard": 0.5}
    assert lora.by_field == {"a": 0.75}
    assert (lora.seconds, lora.adapter_bytes, lora.peak_bytes) == (
        pytest.approx(80 / 3),
        2000,
        2**20,
    )
    assert (lora.general_before, lora.general_after) == (0.5, pytest.approx(0.3))
    assert lora.complete and untrained.complete
    assert (untrained.method, untrained.learning_rate) == ("baseline", None)
    assert untrained.exact_match == (0.25,) and untrained.rates == {}
    assert (untrained.adapter_bytes, untrained.trainable_parameters) == (0, 0)
    assert untrained.early_loss is None and untrained.eval_loss == ()
