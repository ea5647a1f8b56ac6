"""A recorded run of a classifier: what each method trains, its rates, its scores."""

import itertools

import datasets
import pytest
import torch
from recomputing import differences
from small_models import small_bert

from course_utils import records
from course_utils.classification import accuracy, parameter_groups
from course_utils.runtime import Profile
from maintenance.runs import classifier as runs
from maintenance.runs import lists
from maintenance.runs.__main__ import record_family
from maintenance.runs.lists import CLASSIFIERS, LESSON_RUNS

ROWS = [
    {"text": f"{word} {i}", "label": name, "slice": "plain" if i % 2 else "irony"}
    for i in range(8)
    for name, word in (("bad", "aaa"), ("good", "zzz"), ("mixed", "mmm"))
]
METHODS = {
    "prompt": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4},
    "prefix": {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 4},
    "projection": {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": 4,
        "prefix_projection": True,
        "encoder_hidden_size": 8,
    },
    "p_tuning": {
        "peft_type": "P_TUNING",
        "num_virtual_tokens": 4,
        "encoder_hidden_size": 8,
    },
    "lora": {"peft_type": "LORA", "r": 2, "target_modules": ["query", "value"]},
    "head": "head",
    "full": "full",
}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A tiny encoder and eight short texts a class, the same in every split."""
    data = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(runs, "load_classifier", small_bert)
    monkeypatch.setattr(runs, "load_examples", lambda name, split: data)
    profile = Profile("cpu", "cpu", torch.float32, 0)
    monkeypatch.setattr(runs, "get_profile", lambda: profile)
    monkeypatch.setattr(records, "data_folder", lambda: tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_what_it_says_and_learns(method, small):
    experiment = runs.ClassifierExperiment(
        method, METHODS[method], learning_rate=1e-2, steps=12, batch_size=8,
        eval_every=6,
    )  # fmt: skip
    run = runs.run_classifier(experiment, progress=False)
    assert [step for step, _ in run["eval_loss"]] == [6, 12]
    assert len(run["loss"]) == 12 and len(run["predictions"]) == len(ROWS)
    expected = {
        "prompt": 4 * 32 + 99,
        "prefix": 4 * 2 * 2 * 32 + 99,
        "projection": 4 * 32 + 33 * 8 + 9 * 128 + 99,
        "p_tuning": 4 * 32 + 33 * 8 + 9 * 8 + 9 * 32 + 99,
        "lora": 2 * 2 * 2 * 64 + 99,
        "head": 99,
        "full": small_bert(num_labels=3)[0].num_parameters(),
    }
    assert run["trainable_parameters"] == expected[method]
    assert run["measured"]["adapter_bytes"] >= 4 * 99
    if method == "full":
        assert run["loss"][-1] < 0.7 * run["loss"][0]


@pytest.mark.parametrize("method", METHODS)
def test_the_head_has_its_own_rate(method, small):
    model, _ = runs.make_classifier(METHODS[method], 3)
    *body, head = parameter_groups(model, 1.0, 2.0)
    assert head["lr"] == 2.0 and sum(p.numel() for p in head["params"]) == 99
    assert [group["lr"] for group in body] == [1.0] * (method != "head")
    found = {id(p) for group in (*body, head) for p in group["params"]}
    assert found == {id(p) for p in model.parameters() if p.requires_grad}


def test_a_run_uses_the_rate_of_the_head(small):
    options = {"learning_rate": 1e-9, "steps": 8, "batch_size": 8, "eval_every": 8}
    still, moved = (
        runs.run_classifier(
            runs.ClassifierExperiment("full", "full", head_rate=rate, **options),
            progress=False,
        )["loss"]
        for rate in (None, 1.0)
    )
    assert abs(still[-1] - still[0]) < 0.1 < abs(moved[-1] - moved[0])


def test_virtual_tokens_may_start_smaller(small):
    small_, plain = (
        runs.make_classifier(METHODS["prefix"], 3, start_scale=scale)[0]
        for scale in (0.01, 1.0)
    )
    spread = [
        m.prompt_encoder["default"].embedding.weight.std() for m in (small_, plain)
    ]
    assert spread[0] < 0.02 and 0.5 < spread[1] < 2


def test_a_recorded_run_recomputes_its_scores(small):
    options = {"steps": 2, "batch_size": 4, "eval_every": 2}
    make = runs.ClassifierExperiment
    family = [make("head", "head", seed=seed, **options) for seed in (0, 1)]
    record_family("06_try", family, command="make runs", say=lambda line: None)
    record = records.load_record("06_try")
    assert differences(record) == []
    assert [run["seed"] for run in record["runs"]] == [0, 1]
    first = record["runs"][0]
    assert first["metrics"]["accuracy_by_slice"].keys() == {"plain", "irony"}
    assert first["metrics"]["accuracy"] == accuracy(
        first["predictions"], first["references"]
    )
    first["predictions"] = list(first["references"])
    assert differences(record), "an edited prediction is not seen"


def test_an_unknown_method_is_refused(small):
    with pytest.raises(ValueError, match="expected 'full', 'head', 'biases' or a dict"):
        runs.make_classifier("half", 3)


def test_the_classifier_families_are_of_classifiers():
    family = LESSON_RUNS["06"]["06_method_rates"]
    assert {type(e) for e in family} == {runs.ClassifierExperiment}


def test_the_best_rate_of_a_method_is_not_mixed_with_anothers(monkeypatch):
    for a, b in itertools.permutations(CLASSIFIERS, 2):
        assert not b.startswith(f"{a} ")
    asked = []

    def best(name, label):
        asked.append((name, label))
        return CLASSIFIERS[label][1][1]

    monkeypatch.setattr(lists, "best_rate", best)
    family = LESSON_RUNS["06"]["06_methods"]()
    once = list(dict.fromkeys(asked))
    assert once == [("06_method_rates", label) for label in CLASSIFIERS]
    assert [e.seed for e in family] == [0, 1, 2] * len(CLASSIFIERS)
    assert {e.learning_rate for e in family} == {r[1] for _, r in CLASSIFIERS.values()}


@pytest.mark.model
def test_the_built_in_encoder_reads_a_prefix_at_every_layer():
    """An encoder drops no cache: its answer depends on the prefix of its last layer."""
    runs.set_seed(0)
    method = METHODS["prefix"]
    model, tokenizer = runs.make_classifier(method, 3)
    model.eval()
    batch = tokenizer("A quiet room, a rude porter.", return_tensors="pt")
    before = model(**batch).logits
    width = 2 * 384
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight[:, -width:] *= 3
    assert (model(**batch).logits - before).abs().max() > 1e-4
