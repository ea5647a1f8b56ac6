"""Rounding all weights: the recorded run, on a tiny model."""

import math

import pytest
import torch
from recomputing import differences
from small_models import byte_tokenizer, random_llama

from course_utils import records
from maintenance.runs import rounding as rounding_runs
from maintenance.runs.__main__ import make_run, record_family
from maintenance.runs.experiment import LoftQ, QPiSSA, RecordedExperiment
from maintenance.runs.rounding import Rounding, rounded_weight


@pytest.fixture
def small(monkeypatch, tmp_path):
    def load(name=None, *, dtype=None):
        sizes = {"hidden_size": 64, "intermediate_size": 128, "initializer_range": 0.1}
        return random_llama(max_position_embeddings=2048, **sizes).to(dtype)

    monkeypatch.setattr(rounding_runs, "load_model", load)
    monkeypatch.setattr(rounding_runs, "load_tokenizer", lambda _: byte_tokenizer())
    monkeypatch.setattr(records, "data_folder", lambda: tmp_path)
    for cached in (rounding_runs._original, rounding_runs._batches):
        cached.cache_clear()
    yield load
    for cached in (rounding_runs._original, rounding_runs._batches):
        cached.cache_clear()


def family():
    settings = {"steps": 0, "test_examples": 0, "eval_examples": 5}
    return [
        RecordedExperiment("int8", Rounding("int8"), **settings),
        RecordedExperiment("nf4", Rounding("nf4"), **settings),
        RecordedExperiment("loftq", Rounding("nf4", rank=8), start=LoftQ(), **settings),
        RecordedExperiment("fp4", Rounding("fp4"), **settings),
    ]


def test_a_record_of_roundings(small):
    record_family("07_try", family(), command="make runs", say=lambda line: None)
    record = records.load_record("07_try")
    assert differences(record) == []
    runs = {run["label"]: run for run in record["runs"]}
    errors = {label: run["metrics"]["weight_error"] for label, run in runs.items()}
    kl = {label: run["metrics"]["kl"] for label, run in runs.items()}
    assert errors["int8"] < errors["loftq"] < errors["nf4"]
    assert errors["nf4"] < errors["fp4"]
    for texts in ("home_commands", "general_questions"):
        assert 0 < kl["int8"][texts] < kl["nf4"][texts] / 10
        assert runs["nf4"]["metrics"]["kl_standard_error"][texts] > 0
    assert len(runs["nf4"]["measured"]["kl"]["home_commands"]) == 5
    assert set(record["summary"]) >= {"kl", "weight_error", "loss_change"}


def test_kl_and_loss_are_those_of_the_definition(small):
    run = make_run(family()[1])
    original, rounded = small(dtype=torch.float32), small(dtype=torch.float32)
    with torch.no_grad():
        for name, module in rounded.named_modules():
            if isinstance(module, torch.nn.Linear) and "layers" in name:
                new = rounded_weight(module.weight, Rounding("nf4"))
                assert not torch.equal(new, module.weight)
                module.weight.copy_(new)
    batch = rounding_runs._batches(None, "home_commands", 5)[0]
    n = int(batch["attention_mask"][0].sum())
    ids = batch["input_ids"][:1, :n]
    with torch.no_grad():
        p, q = (m(ids).logits[0, :-1].log_softmax(-1) for m in (original, rounded))
    rows = [b["input_ids"] for b in rounding_runs._batches(None, "home_commands", 5)]
    first = rows[0][:, : min(map(len, rows[0]))]
    shared = int((first == first[:1]).all(0).long().cumprod(0).sum())
    assert 10 < shared < n
    p, q, ids = p[shared - 1 :], q[shared - 1 :], ids[:, shared - 1 :]
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item()
    assert math.isclose(run["measured"]["kl"]["home_commands"][0], kl, rel_tol=1e-3)
    nll = torch.nn.functional.nll_loss(q, ids[0, 1:], reduction="sum").item()
    after = run["measured"]["loss_after"]["home_commands"][0]
    assert math.isclose(after, nll, rel_tol=1e-4)
    assert run["measured"]["tokens"]["home_commands"][0] == n - shared


def test_the_scale_of_an_adapter_does_not_matter():
    weight = torch.randn(64, 64)
    found = rounded_weight(weight, Rounding("nf4", rank=4), QPiSSA())
    assert (found - weight).norm() < (Rounding("nf4")(weight) - weight).norm()
