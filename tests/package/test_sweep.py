"""What the sweep found: read from records, tabled, compared; and on own data."""

import json
import math
from dataclasses import replace

import pytest
import torch
from small_models import SPECIAL, byte_tokenizer, random_llama
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from course_utils import records
from course_utils.data import DataError
from course_utils.runtime import Profile
from course_utils.sweep import (
    BUDGET,
    agreement,
    compare_on,
    experiment,
    methods_table,
    recorded_methods,
    results,
)
from course_utils.sweep.experiment import METHODS, SEEDS, ZERO_SHOT, plan, split_sizes
from course_utils.sweep.results import MethodResult, _percent, _size, split_label
from maintenance.runs.lists import LESSON_RUNS
from maintenance.store import save_record

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
    save_record(name, top | {"seconds": 1.0, "runs": runs})


def timed(label, seed, seconds):
    return made_up(label, 1, seed, 1.0, 0, measured={"train_seconds": seconds}) | {
        "label": label,
        "settings": {"learning_rate": 1e-2, "steps": 5, "batch_size": 6},
        "metrics": [],
    }


def test_the_recorded_rates_of_all_methods_can_be_planned_with():
    rates = {r.name: r.learning_rate for r in recorded_methods() if r.learning_rate}
    assert len(rates) == len(METHODS)
    assert set(plan("home_commands", ["LoRA"], rates)) == {"LoRA"}


def test_seconds_are_those_that_were_timed_apart(folder):
    save("08_low_rank", [*LORA_RUNS, made_up("DoRA", 1e-2, 0, 0.4, 1)])
    save("08_speed", [timed("LoRA", 0, 4.0), timed("LoRA", 1, 6.0)])
    lora, dora = recorded_methods()
    assert lora.seconds == pytest.approx(40.0)
    assert lora.score == 0.75, "only the speed is the other record's"
    assert dora.seconds == 10.0


def test_every_method_is_timed_in_turn_and_nothing_else_is_done():
    runs = LESSON_RUNS["08"]["08_speed"]
    names = list(METHODS)
    first, second = runs[: len(names)], runs[len(names) :]
    assert [run.label for run in first] == names
    assert sorted(run.label for run in second) == sorted(names)
    assert first[0].label != second[0].label, "who begins pays for new shapes"
    assert {run.seed for run in runs[: len(names)]} == {0}
    for run in runs:
        assert (run.steps, run.batch_size) == (6, BUDGET["batch_size"])
        assert run.test_examples == 0 and not run.costs and not run.forgetting
        assert run.method == METHODS[run.label][0]


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
    assert untrained.eval_loss == ()


def test_bytes_and_seconds_are_of_the_records_own_machine(folder):
    machine = {"hardware": {"processor": "another"}, "versions": {}}
    more = {"measured": {"train_seconds": 1e6, "peak_bytes": 2**40}, "tokens_per_s": 1}
    away = [run | more | {"machine": machine} for run in LORA_RUNS[3:]]
    save("08_low_rank", [*LORA_RUNS[:3], *away])
    (lora,) = recorded_methods()
    first = next(r for r in LORA_RUNS if r["seed"] == 0 and "0.01" in r["label"])
    assert lora.seconds == first["measured"]["train_seconds"]
    assert lora.peak_bytes == first["measured"]["peak_bytes"]
    assert len(lora.exact_match) == 3, "scores are of all"
    save("08_low_rank", [run | more | {"machine": machine} for run in LORA_RUNS])
    assert recorded_methods()[0].peak_bytes == 2**40, "where there is no other"


def test_no_record_and_half_a_record_are_read_too(folder):
    assert recorded_methods() == []
    save("08_low_rank", LORA_RUNS[:2] + [made_up("full", 1e-3, 0, math.nan, 0)])
    lora, full = recorded_methods()
    assert lora.learning_rate == 1e-2 and not lora.complete  # at the edge
    assert lora.exact_match == (0.5,) and lora.general_after is None
    assert full.rates == {1e-3: (None, 0.0, 0.0)} and full.eval_loss == ()
    assert full.loss is None and not full.complete
    table = methods_table([full, lora])
    assert [row[0] for row in table.rows] == [
        "LoRA (incomplete)",
        "full fine-tuning (incomplete)",
    ]


@pytest.mark.parametrize(
    ("left", "complete"),
    [
        (LORA_RUNS, True),
        ([UNTRAINED], True),
        (LORA_RUNS[:4], False),  # a seed is missing
        (LORA_RUNS[1:], False),  # the best is at the edge
        ([*LORA_RUNS[:4], LORA_RUNS[4] | {"eval_loss": [[40, math.nan]]}], False),
    ],
)
def test_complete_is_inside_the_grid_with_every_seed(folder, left, complete):
    save("08_others", left)
    assert recorded_methods()[0].complete == complete


ONE = MethodResult(
    "LoRA",
    "lora",
    0.01,
    exact_match=(0.4, 0.5, 0.6),
    field_f1=(0.7, 0.8, 0.9),
    eval_loss=(0.30, 0.34),
    trainable_parameters=2_442_240,
    adapter_bytes=9_796_544,
    peak_bytes=1900 * 2**20,
    seconds=61.6,
    general_before=0.45,
    general_after=0.31,
    complete=True,
)
FULL = replace(
    ONE,
    name="full",
    method="full",
    learning_rate=3e-4,
    eval_loss=(0.33, 0.37),
    trainable_parameters=134_515_008,
    adapter_bytes=538_060_032,
)
ASKED = MethodResult(
    "prompting, few-shot", "baseline", exact_match=(0.09,), complete=True, seconds=0.0
)


def test_the_table_reads_well_and_is_ordered_by_score():
    worse = replace(ONE, name="DoRA", exact_match=(0.1, 0.2, 0.3))
    table = methods_table([ASKED, worse, FULL, ONE])
    names = [row[0] for row in table.rows]
    # LoRA and full have one score: the lower validation loss stands first
    assert names == ["LoRA", "full fine-tuning", "DoRA", "prompting, few-shot"]
    assert table.rows[0] == (
        *("LoRA", "0.01", "50 % (40–60)", "0.80", "0.320", "2,442,240", "1.8 %"),
        *("9.8 MB", "1,900 MiB", "62 s", "31 %"),
    )
    assert table.rows[1][5:8] == ("134,515,008", "100 %", "538 MB")
    assert table.rows[3][1:3] == ("–", "9 %") and table.rows[3][8:] == ("–",) * 3
    assert table.head[-1] == "general questions (before: 45 %)"
    lines = table._repr_markdown_().splitlines()
    assert len(lines) == 6 and {line.count("|") for line in lines} == {12}
    text = str(table).splitlines()
    assert len({line.index("50 %") for line in text[1:3]}) == 1 and len(text) == 5
    other = methods_table([ONE], total_parameters=24_422_400)
    assert other.rows[0][6] == "10 %"


def test_shares_and_sizes_are_rounded_as_said():
    assert _percent((0.0,)) == "0 %" and _percent((0.125, 0.5)) == "31 % (12–50)"
    assert [_size(n) for n in (99_400, 999_499, 999_500, 12_345_678, 99.6e6)] == [
        *("99 kB", "999 kB", "1 MB", "12 MB", "100 MB"),
    ]


APART = replace(FULL, name="QLoRA", eval_loss=(0.50, 0.52, 0.51))
SINGLE = replace(FULL, name="DoRA", eval_loss=(0.9,))
CHANGED = "Your order is not the recorded one. These changed places:"


@pytest.mark.parametrize(
    ("mine", "said"),
    [
        (
            {"full": 0.9, "LoRA": 0.8, "QLoRA": 1.0},
            "Your order is the recorded one: LoRA, then full fine-tuning, then QLoRA.",
        ),
        (
            {"LoRA": 0.8, "full": 0.7},
            f"{CHANGED} LoRA and full fine-tuning (their recorded seeds overlap: "
            "noise).",
        ),
        (
            {"LoRA": math.nan, "QLoRA": 0.7},
            f"{CHANGED} LoRA and QLoRA (their recorded seeds do not overlap: a shorter "
            "run, or other settings).",
        ),
        (
            {"LoRA": 0.8, "full": 0.7, "QLoRA": 0.75},
            f"{CHANGED} LoRA and full fine-tuning (their recorded seeds overlap: "
            "noise); LoRA and QLoRA (their recorded seeds do not overlap: a shorter "
            "run, or other settings).",
        ),
        (
            {"LoRA": 0.8, "DoRA": 0.7},
            f"{CHANGED} LoRA and DoRA (too few recorded seeds to tell noise from a "
            "difference).",
        ),
        (
            {"LoRA": 0.8, "mine": 0.7},
            "Nothing to compare yet: fewer than two of your methods are recorded.",
        ),
    ],
)
def test_agreement_names_what_changed_places_and_whether_it_is_noise(mine, said):
    assert agreement(mine, [ONE, FULL, APART, SINGLE]) == said


def test_a_tie_is_no_disagreement():
    same = replace(FULL, eval_loss=ONE.eval_loss)
    for mine in ({"LoRA": 0.8, "full": 0.7}, {"LoRA": 0.7, "full": 0.8}):
        assert "is the recorded one" in agreement(mine, [ONE, same])
    assert "is the recorded one" in agreement({"LoRA": 1, "full": 1}, [ONE, FULL])


# --- the sweep's definition ------------------------------------------------------


def test_the_sweep_begins_with_three_rates_of_each_method(folder):
    families = LESSON_RUNS["08"]
    runs = [*families["08_low_rank"](), *families["08_others"]()]
    methods = METHODS
    rates = {}
    for one in runs:
        name, _ = split_label({"label": one.label})
        rates.setdefault(name, []).append(one.learning_rate)
    assert rates.keys() == methods.keys() | {ZERO_SHOT, "prompting, few-shot"}
    assert len(methods) == 11 and len(SEEDS) >= 3
    for name, (method, first, more) in methods.items():
        assert len(rates[name]) == 3 and sorted(rates[name])[1] == first
        same = [one for one in runs if one.label.startswith(f"{name} lr ")]
        assert all(one.method == method for one in same)
        for key, value in (BUDGET | more).items():
            assert {getattr(one, key) for one in same} == {value}, key
    assert {one.data for one in runs} == {"home_commands"}


# --- the reader's own data -------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch, folder):
    """A tiny random model in place of the course's."""

    def load(name=None, *, dtype=None, quantization=None):
        return random_llama(initializer_range=0.05).to(dtype or torch.float32)

    for module in (experiment, results):
        monkeypatch.setattr(module, "load_model", load)
    monkeypatch.setattr(
        experiment, "load_tokenizer", lambda name=None: byte_tokenizer()
    )
    profile = Profile("cpu", "cpu", torch.float32, 0)
    monkeypatch.setattr(experiment, "get_profile", lambda: profile)


def write(path, completion, count=60):
    rows = [{"prompt": f"say {i}", "completion": completion(i)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


SMALL = {"steps": 4, "eval_examples": 3, "test_examples": 2}


def test_own_json_is_compared_at_the_recorded_rates(tiny, tmp_path, capsys):
    save("08_low_rank", LORA_RUNS)
    file = write(tmp_path / "my.jsonl", lambda i: json.dumps({"n": i}))
    methods = ("lora", ZERO_SHOT, "full")
    found = compare_on(file, methods=methods, rates={"full": 1e-3}, **SMALL)
    lora, asked, full = found.results
    assert [r.name for r in found.results] == ["LoRA", ZERO_SHOT, "full"]
    assert (lora.learning_rate, full.learning_rate) == (1e-2, 1e-3)
    sizes = split_sizes(str(file), 4)
    assert sum(sizes.values()) == 60
    assert len(lora.exact_match) == 1 == len(lora.field_f1)
    assert asked.learning_rate is None and len(asked.exact_match) == 1
    assert full.trainable_parameters == random_llama().num_parameters()
    assert 0 < lora.trainable_parameters < full.trainable_parameters
    assert lora.peak_bytes and lora.adapter_bytes < full.adapter_bytes
    assert [r.loss for r in (lora, full)] == [
        pytest.approx(found.runs[k]["eval_loss"][-1][1]) for k in (0, 2)
    ]
    shares = {row[0]: row[6] for row in found.rows}
    assert shares["full fine-tuning"] == "100 %"
    text = str(found)
    assert f"Examples: {sizes['train']} train" in text
    assert "the reference's JSON, on 2 test examples" in text
    assert "incomplete" not in text and found._repr_markdown_() in (
        found._repr_markdown_()
    )
    printed = capsys.readouterr().out
    assert "LoRA lr 0.01: 4 steps of 4" in printed and "train" in printed


@pytest.mark.parametrize("layout", [None, "alpaca"])
def test_a_base_model_without_a_chat_template_is_compared(
    tiny, tmp_path, monkeypatch, layout
):
    text = byte_tokenizer().backend_tokenizer.to_str()
    for old, new in zip(SPECIAL, ("<unk>", "<bos>", "<eos>"), strict=True):
        text = text.replace(old, new)
    made = Tokenizer.from_str(text)
    base = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")
    monkeypatch.setattr(experiment, "load_tokenizer", lambda name=None: base)
    asked, real = [], experiment.evaluate

    def spy(model, tokenizer, test, *, template, **options):
        asked.append(template)
        return real(model, tokenizer, test, template=template, **options)

    monkeypatch.setattr(experiment, "evaluate", spy)
    file = write(tmp_path / "chat.jsonl", lambda i: f"It is {i}.")
    methods = ("LoRA", ZERO_SHOT)
    found = compare_on(file, methods=methods, template=layout, **SMALL)
    assert asked == [layout or "plain"] * 2
    assert all(len(result.exact_match) == 1 for result in found.results)
    assert found.results[0].loss is not None
    settings = found.runs[0]["settings"]
    assert settings.get("template") == layout, "old records name none"


def test_free_text_is_compared_as_text(tiny, tmp_path):
    file = write(tmp_path / "chat.jsonl", lambda i: f"It is {i}.")
    found = compare_on(file, methods=["LoRA"], **SMALL)
    (lora,) = found.results
    assert lora.field_f1 == () and len(lora.exact_match) == 1
    assert lora.loss is not None and "the reference's text" in str(found)
    assert found.runs[0]["metrics"].keys() >= {"exact_text", "final_eval_loss"}
    assert found.rows[0][3] == "–"


def test_what_cannot_be_compared_is_said(tiny, tmp_path):
    file = write(tmp_path / "my.jsonl", lambda i: "{}")
    with pytest.raises(ValueError, match="'lorra'; known: LoRA, LoRA, attention.*zero"):
        compare_on(file, methods=["lorra"])
    with pytest.raises(ValueError, match="'half'"):
        compare_on(file, rates={"half": 1e-3})
    with pytest.raises(ValueError, match="no method is named"):
        compare_on(file, methods=[])
    mixed = write(tmp_path / "mixed.jsonl", lambda i: "{}" if i % 2 else "yes")
    with pytest.raises(DataError, match="test completions are JSON objects.*all of"):
        compare_on(mixed)
    few = write(tmp_path / "few.jsonl", lambda i: "{}", count=3)
    with pytest.raises(DataError, match="too few examples: .* 0 (validation|test)"):
        compare_on(few)
    with pytest.raises(DataError, match="48 or more to train on"):
        split_sizes(str(write(tmp_path / "mid.jsonl", lambda i: "{}", count=50)), 48)
    chat = tmp_path / "chat.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat.write_text((json.dumps({"messages": turns}) + "\n") * 60)
    with pytest.raises(DataError, match="found no completion and no prompt"):
        compare_on(chat)
    with pytest.raises(DataError, match="no such file"):
        compare_on(tmp_path / "none.jsonl")


def test_on_other_data_nothing_begins_at_the_courses_task(folder):
    names = ["prompt tuning", "prefix tuning", "QLoRA"]
    ours = plan("home_commands", names, {}, steps=5)
    ours = list(ours.values())
    prompt, prefix, qlora = plan("my.jsonl", names, {"qlora": 0.5}).values()
    assert (ours[0].data, prompt.data) == ("home_commands", "my.jsonl")
    assert ours[0].steps == 5
    assert ours[0].method["prompt_tuning_init"] == "TEXT"
    assert prompt.method["prompt_tuning_init"] == "SAMPLE_VOCAB"
    assert (ours[1].prefix_from, prefix.prefix_from) == ("schema", None)
    assert (qlora.quantization, qlora.learning_rate) == ("nf4", 0.5)
    assert prompt.learning_rate == METHODS["prompt tuning"][1]
