"""The benchmark's arithmetic: medians, ratios, shares, turns. It measures nothing."""

import copy
import dataclasses
import doctest
import importlib
import json
from pathlib import Path

import pytest

from course_utils import records
from maintenance import readme
from maintenance.benchmarks import summary
from maintenance.benchmarks.summary import (
    kind_of,
    shares,
    speed,
    spread,
    summarise,
    table,
)
from maintenance.store import differences, save_record

ROOT = Path(__file__).resolve().parents[2]


def training(name, number, seconds, method="lora", part="training", loss=(2.0, 1.0)):
    return {
        "label": f"{part} · {method} · {name}",
        "settings": {"part": part, "name": name, "method": method},
        "seed": number,
        "loss": list(loss),
        "metrics": {},
        "seconds": 9.0 + seconds,
        "measured": {"step_seconds": [9.0, seconds], "tokens": [999, 100, 555]},
    }


def beside(name, course_s, bare_loop_s, part="ablation"):
    """Steps of 100 tokens, each beside one of the bare loop's of 50."""
    steps = {"course": course_s, "bare_loop": bare_loop_s}
    measured = {f"{who}_s": seconds for who, seconds in steps.items()}
    measured["course_tokens"] = [100] * (len(course_s) + 1)  # one batch ahead
    measured["bare_loop_tokens"] = [50] * len(bare_loop_s)
    return training(name, 0, 1.0, part=part) | {"measured": measured}


def answers(name, number, seconds, chosen, texts):
    return {
        "label": f"answers · {name}",
        "settings": {"part": "answers", "name": name},
        "seed": number,
        "loss": [],
        "metrics": {},
        "seconds": seconds,
        "predictions": texts,
        "measured": {"answers": len(chosen), "chosen": chosen},
    }


@pytest.fixture
def runs():
    made = [training("course", i, s) for i, s in enumerate((1.0, 2.0, 1.0))]
    made += [training("classic", i, s) for i, s in enumerate((4.0, 12.0, 5.0))]
    made += [beside("the course's path", [99.0, 1.0, 4.0], [9.0, 1.0, 4.0])]
    made += [beside("padding", [9.0, 4.0, 2.0], [9.0, 2.0, 1.0])]
    made += [beside("course and bare loop", [9.0, 1.0], [9.0, 3.0], part="pairs")]
    made += [answers("batched", 0, 2.0, [0, 1, 2, 3], ["a", "b", "c", "d"])]
    made += [answers("batched, by a view", 0, 5.0, [0, 1, 2, 3], ["a", "b", "c", "d"])]
    made += [answers("one by one", 0, 6.0, [0, 2], ["a", "x"])]
    return made


def test_the_first_step_and_batches_fetched_ahead_do_not_count():
    assert speed(training("course", 0, 2.0)) == 50.0
    both = training("course", 0, 2.0)
    both["measured"] = {k: [v, v] for k, v in both["measured"].items()}
    assert speed(both) == 100.0, "two processes at once train twice as much"


def test_ratios_are_taken_within_a_round(runs):
    found = summarise(runs)
    assert found["course_against"]["lora"]["classic"] == {
        "median": 5.0,
        "least": 4.0,
        "most": 6.0,
        "rounds": 3,
    }
    assert found["tokens_per_s"]["lora"]["course"] == spread([100.0, 50.0, 100.0])
    assert found["taken_away"] == {"padding": spread([0.5, 0.5])}
    assert found["course_against_bare_loop"] == {"lora": spread([6.0])}
    assert found["answers"]["batched_against_one_by_one"]["median"] == 6.0
    assert found["answers"]["batched_against_by_a_view"]["median"] == 2.5
    assert (found["answers"]["different"], found["answers"]["compared"]) == (1, 2)
    lines = "\n".join(table(found))
    assert "5.00 (4.00 to 6.00)" in lines and "1 of 2 answers differ" in lines
    assert "by a view: 2.50" in lines


def test_compiling_pays_after_its_cost_is_saved_or_never():
    run = {
        "settings": {"part": "compile", "name": "step"},
        "measured": {
            "plain_seconds": [5.0, 2.0, 2.0],
            "compiled_seconds": [61.0, 1.0, 1.0],
        },
    }
    assert summarise([run])["compile"]["pays_after_steps"] == 60.0
    run["measured"]["compiled_seconds"] = [61.0, 3.0, 3.0]
    assert "pays_after_steps" not in summarise([run])["compile"]
    assert any("never pays" in line for line in table(summarise([run])))


def test_an_edited_second_or_figure_of_the_record_is_found(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "runs_folder", lambda: tmp_path)
    record = {
        "command": "make bench",
        "hardware": {},
        "versions": {},
        "data": {"name": "home_commands", "sha256": "0"},
        "seconds": 1.0,
        "runs": runs,
    }
    save_record("bench", record)
    saved = records.load_record("bench")
    assert differences(saved) == []
    ratio = "bench:course_against.lora.classic.median"
    assert readme.recorded(ratio) == 5.0
    edited = copy.deepcopy(saved)
    edited["runs"][0]["measured"]["step_seconds"][1] = 1.5
    assert differences(edited)
    edited = copy.deepcopy(saved)
    edited["summary"]["course_against"]["lora"]["classic"]["median"] = 5.1
    assert differences(edited)


def test_the_examples_of_the_summary_run():
    found = doctest.testmod(summary)
    assert found.attempted and not found.failed


def test_every_second_of_a_profile_has_one_kind():
    events = {"aten::mm": 3.0, "aten::_softmax": 1.0, "aten::_fused_adamw_": 1.0}
    events |= {"aten::_log_softmax": 1.0, "aten::copy_": 1.0, "aten::silu": 1.0}
    found = shares(events, 10.0)
    assert sum(found.values()) == pytest.approx(1.0)
    assert found["Python"] == pytest.approx(0.2)
    kinds = [kind for kind in found if found[kind]]
    assert len(kinds) == 7, "each of these six operators is of another kind"
    assert kind_of("aten::_log_softmax_backward_data") == "loss"
    assert kind_of("aten::_softmax_backward_data") == "attention"


def test_each_round_begins_with_another_task():
    main = importlib.import_module("maintenance.benchmarks.turns")
    task = main.Task("training", "a", dict, {"method": "lora"})
    tasks = [dataclasses.replace(task, name=name) for name in "abc"]
    tasks[2] = dataclasses.replace(tasks[2], once=True)
    order = [(task.name, number) for task, number in main.in_turn(tasks, 3)]
    assert order == [
        *(("a", 0), ("b", 0), ("c", 0)),
        *(("b", 1), ("a", 1)),
        *(("a", 2), ("b", 2)),
    ]


def test_what_the_benchmark_takes_away_is_there():
    training = importlib.import_module("maintenance.benchmarks.training")
    taken = [patch for patches, _ in training.ABLATION.values() for patch in patches]
    for owner, name, replacement in taken:
        assert callable(getattr(owner, name)) and callable(replacement), name


def test_the_environment_of_litgpt_is_pinned():
    lines = (ROOT / "maintenance/benchmarks/litgpt.txt").read_text().split()
    assert all("==" in line for line in lines)
    pins = dict(line.split("==") for line in lines)
    assert "litgpt" in pins
    ours = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().split("\n")
        if "==" in line
    )
    assert pins["torch"] == ours["torch"], "the same PyTorch, or speeds mean nothing"


def test_the_record_came_from_this_summary():
    """`data/runs/bench.json`, where it is there, holds what its seconds give."""
    if "bench" not in records.list_records():
        pytest.skip("make bench has not been recorded yet")
    record = records.load_record("bench")
    assert differences(record) == []
    assert json.loads(json.dumps(summary.summarise(record["runs"])))
