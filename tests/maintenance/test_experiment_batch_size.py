"""Steps to a loss by batch size: the best rate is inside, and all is looked at once."""

import math
from types import SimpleNamespace

import pytest
from recomputing import differences

from course_utils import records
from maintenance.runs import batch_size as runs
from maintenance.runs.__main__ import record_family
from maintenance.runs.lists import LESSON_RUNS


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """A lesson whose best rate is 2**-6 at any batch; what it was asked for."""
    calls = []

    def steps_to(target, batch, rate, seed, limit, model=None):
        calls.append((batch, rate, limit))
        steps = round(1000 / batch * (1 + abs(math.log2(rate) + 6)))
        return steps if steps <= limit and rate < 0.06 else None

    lesson = SimpleNamespace(steps_to=steps_to, noise_scale=lambda model: 50.0)
    lesson.letter_model = lambda seed: seed
    monkeypatch.setattr(runs, "lesson", lambda: lesson)
    monkeypatch.setattr(records, "runs_folder", lambda: tmp_path)
    return calls


def test_the_best_rate_lies_inside_and_its_neighbourhood_is_known(asked):
    run = runs.run_batch_size(runs.BatchSizes(10))
    assert run["metrics"] == {
        "best_rate": 2**-6,
        "fewest_steps": 100,
        "noise_scale": 50.0,
    }
    rates = [float(rate) for rate in run["measured"]["steps"]]
    assert min(rates) < 2**-6 < max(rates) and rates == sorted(rates)
    assert run["measured"]["off"]["five times"] is None
    assert run["measured"]["doubled"]["1"] == 50
    assert run["measured"]["doubled"]["3"] > run["measured"]["doubled"]["2"] > 50
    assert (20, 3 * 2**-6, 300) in asked


def test_the_record_is_computed_again_from_its_runs(asked):
    family = [runs.BatchSizes(size, seed=seed) for size in (10, 20) for seed in (0, 1)]
    say = lambda line: None  # noqa: E731
    assert record_family("11_batch_size", family, command="x", say=say) == 4
    assert record_family("11_batch_size", family, command="x", say=say) == 0
    record = records.load_record("11_batch_size")
    assert differences(record) == []
    assert record["summary"]["fewest_steps"] == {"batch 10": 100.0, "batch 20": 50.0}


def test_the_lesson_quotes_three_seeds_of_each_size():
    family = LESSON_RUNS["11"]["11_batch_size"]
    sizes = {run.batch_size for run in family}
    assert {(run.batch_size, run.seed) for run in family} == {
        (size, seed) for size in sizes for seed in (0, 1, 2)
    }
