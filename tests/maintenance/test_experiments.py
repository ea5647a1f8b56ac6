"""Recorded runs: what is trained, what is spoiled, and resuming a family of runs."""

import copy
import json
import math

import pytest
import torch
from recomputing import differences
from small_models import byte_tokenizer, random_llama

from course_utils import records
from course_utils.data import data_hash, load_examples
from course_utils.runtime import Profile
from course_utils.sweep import experiment as sweep_runs
from course_utils.sweep.experiment import LastLayers, Prompting
from maintenance.runs import __main__ as command
from maintenance.runs import experiment as runs
from maintenance.runs.__main__ import record_family
from maintenance.runs.experiment import (
    Bottleneck,
    RecordedExperiment,
    make_recorded_model,
    make_recorded_rows,
    run_training,
)
from maintenance.runs.lists import LESSON_RUNS, best_rate, sweep_family
from maintenance.runs.rounding import Rounding

LORA = {"peft_type": "LORA", "r": 2, "target_modules": "all-linear"}

UNTRAINED = (Prompting, Rounding)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A tiny random model in float32, and records in a folder of this test's own."""

    def load(name=None, *, dtype=None, quantization=None):
        return random_llama(initializer_range=0.05).to(dtype or torch.float32)

    for module in (sweep_runs, runs):
        monkeypatch.setattr(module, "load_model", load)
        monkeypatch.setattr(
            module, "load_tokenizer", lambda name=None: byte_tokenizer()
        )
    profile = Profile("cpu", "cpu", torch.float32, 0)
    for module in (sweep_runs, runs):
        monkeypatch.setattr(module, "get_profile", lambda: profile)
    monkeypatch.setattr(records, "data_folder", lambda: tmp_path)
    runs._untuned.cache_clear()
    yield
    runs._untuned.cache_clear()


def quick(label="full", method="full", **more):
    settings = {"steps": 3, "batch_size": 4, "learning_rate": 1e-2, "eval_examples": 4}
    settings |= {"train_examples": 24, "test_examples": 0}
    return RecordedExperiment(label, method, **settings | more)


def trainable(method):
    model = make_recorded_model(quick(method=method))
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_each_method_trains_what_it_says(small):
    everything = {name for name, _ in random_llama().named_parameters()}
    assert trainable("full") == everything
    assert trainable("head") == {"lm_head.weight"}
    assert trainable(LastLayers(2)) == everything - {"model.embed_tokens.weight"}
    frozen = {n for n in everything if n.startswith("model.layers.0.")}
    assert trainable(LastLayers(1)) == trainable(LastLayers(2)) - frozen
    assert all("lora_" in name for name in trainable(LORA)) and trainable(LORA)
    for wrong in (LastLayers(3), "freeze:1", "half"):
        with pytest.raises(ValueError, match="expected 'full'"):
            make_recorded_model(quick(method=wrong))


def test_a_bottleneck_is_the_identity_and_all_that_is_trained(small):
    torch.manual_seed(0)
    model, ids = (
        make_recorded_model(quick(method=Bottleneck(3))),
        torch.tensor([[5, 6]]),
    )
    d, places = model.config.hidden_size, 2 * model.config.num_hidden_layers
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == places * (2 * 3 * d + 3 + d)
    plain = random_llama(initializer_range=0.05)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    up = model.model.layers[1].mlp.down_proj.adapter[2]
    torch.nn.init.ones_(up.bias)
    plain.model.layers[1].mlp.down_proj.bias = torch.nn.Parameter(torch.ones(d))
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)
    assert quick(method=Bottleneck(3)).settings()["method"] == "bottleneck:3"


def test_a_run_of_adalora_says_which_ranks_are_left(small):
    method = {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "total_step": 3}
    method |= {"target_modules": ["q_proj", "v_proj"]}
    run = run_training(quick("AdaLoRA", method), progress=False)
    left, layers = run["measured"]["ranks"], random_llama().config.num_hidden_layers
    assert {kind: len(ranks) for kind, ranks in left.items()} == {
        "q_proj": layers,
        "v_proj": layers,
    }
    assert sum(run["metrics"]["ranks"].values()) == 2 * 2 * layers
    assert run["metrics"]["ranks"]["q_proj"] == sum(left["q_proj"])
    assert "ranks" not in run_training(quick(), progress=False)["metrics"]


def test_spoiled_records_are_spoiled_as_said(small):
    tokenizer = byte_tokenizer()

    def learned(experiment):
        rows = make_recorded_rows(experiment)
        return [
            tokenizer.decode([i for i in row["labels"] if i != -100]) for row in rows
        ]

    good = learned(quick(train_examples=20))
    shuffled = learned(quick(train_examples=20, shuffle_labels=True))
    assert sorted(good) == sorted(shuffled) and good != shuffled
    assert all(text.startswith("{") for text in good)
    wrong = learned(quick(train_examples=20, wrong_mask=True))
    assert all("action" not in text for text in wrong)
    other = learned(quick(train_examples=20, seed=1))
    assert len(other) == 20 and sorted(other) != sorted(good)


def test_a_run_has_what_a_record_needs(small, monkeypatch):
    asked = {"loss": 5.0, "answer_share": 0.0}
    monkeypatch.setattr(runs, "_general", lambda model, tok: asked)
    name = "model.layers.1.self_attn.q_proj.weight"
    experiment = quick(
        test_examples=3,
        validation_answers=2,
        eval_every=2,
        forgetting=True,
        spectra=(name,),
        steps=4,
    )
    record_family("02_try", [experiment], command="make runs", say=lambda line: None)
    record = records.load_record("02_try")
    (run,) = record["runs"]
    assert differences(record) == []
    assert len(run["loss"]) == 4 and [s for s, _ in run["eval_loss"]] == [2, 4]
    assert run["loss"][-1] < run["loss"][0]
    assert len(run["predictions"]) == len(run["slices"]) == 3
    assert set(run["metrics"]) >= {"exact_match", "by_slice", "final_eval_loss"}
    assert len(run["measured"]["validation"]["predictions"]) == 2
    assert run["metrics"]["validation_exact_match"] == 0
    values = run["measured"]["singular_values"][name]
    assert len(values) == 32 and values == sorted(values, reverse=True) and values[0]
    assert run["measured"]["general_questions"]["before"] == asked
    assert run["trainable_parameters"] == random_llama().num_parameters()
    assert run["tokens_per_s"] > 0 and run["settings"]["learning_rate"] == 1e-2


def test_a_second_test_is_answered_in_full_and_scored_apart(small, monkeypatch):
    asked = load_examples("home_commands", "test").select(range(3))

    def load(name, *rest, **options):
        return asked if name == "another" else load_examples(name, *rest, **options)

    for module in (sweep_runs, runs):
        monkeypatch.setattr(module, "load_examples", load)
    monkeypatch.setattr(runs, "data_hash", lambda name: f"hash of {name}")
    family = [quick(test_examples=2, also_test="another")]
    record_family("02_try", family, command="x", say=lambda line: None)
    record = records.load_record("02_try")
    (run,) = record["runs"]
    found = run["measured"]["also_test"]
    assert found["sha256"] == "hash of another"
    assert found["references"] == asked["completion"]
    assert found["slices"] == asked["slice"] and len(run["predictions"]) == 2
    assert run["metrics"]["also_test_exact_match"] == 0
    assert set(run["metrics"]["also_test_by_slice"]) == set(asked["slice"])
    found["predictions"][0] = found["references"][0]
    assert any("also_test_exact_match" in one for one in differences(record))
    assert "also_test" not in quick().settings()


@pytest.mark.parametrize("more", [{"loraplus_ratio": 16.0}, {"schedule": "cosine"}])
def test_adapters_are_trained_by_the_same_path(small, more):
    run = run_training(quick("LoRA", LORA, **more), progress=False)
    assert [step for step, _ in run["eval_loss"]] == [3]
    assert run["trainable_parameters"] < 5000
    assert all(math.isfinite(value) for value in run["loss"])


def test_a_second_set_is_mixed_in(small):
    whole = {"train_examples": None}
    plain, both = (
        make_recorded_rows(quick(**whole)),
        make_recorded_rows(quick(also="instructions", **whole)),
    )
    assert len(plain) == len(load_examples("home_commands"))
    assert both[: len(plain)] == plain and len(both) > len(plain)
    assert "also" not in quick().settings()
    assert quick(also="instructions").settings()["also"] == "instructions"


def test_a_long_run_that_is_stopped_goes_on(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runs, "LONG_RUN_STEPS", 6)
    monkeypatch.setattr(runs, "build_folder", lambda: tmp_path)
    long = quick("long", steps=6, eval_every=2, test_examples=0)
    whole = run_training(long, progress=False)
    assert not list((tmp_path / "runs").iterdir())

    log = runs.ElapsedSeconds.on_log

    def stop_in_step_5(self, args, state, control, **more):
        log(self, args, state, control, **more)
        state.log_history[-1]["elapsed_s"] += 1000
        if state.global_step == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(runs.ElapsedSeconds, "on_log", stop_in_step_5)
        with pytest.raises(KeyboardInterrupt):
            run_training(long, progress=False)
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "checkpoint-4").is_dir()
    capsys.readouterr()
    rest = run_training(long)
    assert "step 5 of 6" in capsys.readouterr().out
    assert rest["loss"] == pytest.approx(whole["loss"], abs=1e-6)
    assert dict(rest["eval_loss"]) == pytest.approx(dict(whole["eval_loss"]), abs=1e-6)
    assert rest["measured"]["train_seconds"] > 1000 < rest["seconds"] < 2000
    assert rest["tokens_per_s"] < whole["tokens_per_s"] / 10
    assert not folder.exists()


def test_a_kept_prompt_holds_what_was_learned_and_no_path(small, monkeypatch, tmp_path):
    from peft import PeftModel

    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    byte_tokenizer().name_or_path = str(tmp_path / "tokenizer")
    monkeypatch.setattr(runs, "data_folder", lambda: tmp_path)
    method = {
        "peft_type": "PROMPT_TUNING",
        "num_virtual_tokens": 4,
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "abcd",
    }
    started = make_recorded_model(quick(method=method)).get_prompt(1)
    words = random_llama(initializer_range=0.05).get_input_embeddings()
    encoded = byte_tokenizer()("abcd", return_tensors="pt")["input_ids"]
    assert torch.equal(started, words(encoded))
    run = run_training(quick(method=method, keep_adapter="x"), progress=False)
    folder = tmp_path / "adapters" / "x"
    assert str(tmp_path) not in json.dumps(run)
    assert {f.name for f in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert str(tmp_path) not in (folder / "adapter_config.json").read_text()
    kept = folder / "adapter_model.safetensors"
    assert run["measured"]["adapter_bytes"] == kept.stat().st_size > 4 * 4 * 32
    loaded = PeftModel.from_pretrained(random_llama(initializer_range=0.05), folder)
    assert loaded.get_prompt(1).shape == started.shape
    assert not torch.allclose(loaded.get_prompt(1), started, atol=1e-4)


def fake(calls):
    def run(experiment):
        calls.append((experiment.label, experiment.seed))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {
            "label": experiment.label,
            "settings": experiment.settings(),
            "seed": experiment.seed,
            "loss": [1.0],
            "eval_loss": [[1, abs(math.log10(experiment.learning_rate) + 3.0)]],
            "metrics": {"final_eval_loss": None},
            "seconds": 1.0,
        }

    return run


def test_a_family_resumes_where_it_was_stopped(small):
    family = [*quick("a").seeds(0, 1), quick("b"), quick("b", learning_rate=1e-3)]
    calls, lines = [], []
    options = {"command": "x", "run": fake(calls), "say": lines.append}
    with pytest.raises(KeyboardInterrupt):
        record_family("02_try", family, **options)
    assert len(records.load_record("02_try")["runs"]) == 2
    assert record_family("02_try", family, **options) == 2
    assert calls == [("a", 0), ("a", 1), ("b", 0), ("b", 0), ("b", 0)]
    assert record_family("02_try", family, **options) == 0
    runs = records.load_record("02_try")["runs"]
    assert [run["label"] for run in runs] == ["a", "a", "b", "b"]
    assert "run 1 of 4 · a, seed 0" in lines[1]
    assert "2 of 4 runs are there" in " ".join(lines)


def test_a_run_made_on_another_machine_says_so(small, monkeypatch):
    options = {"command": "x", "run": fake([]), "say": lambda line: None}
    record_family("02_try", [quick("a")], **options)
    monkeypatch.setattr(command, "hardware", lambda: {"processor": "other"})
    record_family("02_try", [quick("a"), quick("b")], **options)
    record = records.load_record("02_try")
    first, second = record["runs"]
    assert "machine" not in first and record["hardware"]["processor"] != "other"
    assert second["machine"]["hardware"] == {"processor": "other"}
    assert second["machine"]["versions"] == record["versions"]


def test_a_record_against_other_data_is_not_continued(small, monkeypatch):
    options = {"command": "x", "run": fake([]), "say": lambda line: None}
    record_family("02_try", [quick()], **options)
    monkeypatch.setattr(command, "source_hash", lambda name: "f" * 64)
    with pytest.raises(ValueError, match="recorded against other data"):
        record_family("02_try", [quick()], **options)


def test_a_record_holds_the_second_data_set_too(small, monkeypatch):
    options = {"command": "x", "run": fake([]), "say": lambda line: None}
    family = [quick(also="reviews")]
    record_family("02_both", family, **options)
    source = records.load_record("02_both")["data"]
    assert source["also"] == {"name": "reviews", "sha256": data_hash("reviews")}
    hashes = {"reviews": "f" * 64}
    now = lambda name: hashes.get(name) or data_hash(name)  # noqa: E731
    monkeypatch.setattr(command, "source_hash", now)
    with pytest.raises(ValueError, match="recorded against other data"):
        record_family("02_both", family, **options)
    with pytest.raises(ValueError, match="one data set a record"):
        record_family("02_mixed", [*family, quick("b")], **options)


def test_the_best_rate_is_inside_its_grid(small):
    def grid(name, rates):
        family = [quick(f"LoRA lr {r:g}", learning_rate=r) for r in rates]
        for one in family:  # one at a time: the fake stops at its third call
            options = {"command": "x", "say": lambda line: None}
            done = family[: family.index(one) + 1]
            record_family(name, done, run=fake([]), **options)

    grid("04_inside", (1e-4, 1e-3, 1e-2))
    assert best_rate("04_inside", "LoRA") == 1e-3
    grid("04_edge", (1e-3, 1e-2))
    with pytest.raises(ValueError, match="extend the grid"):
        best_rate("04_edge", "LoRA")


@pytest.mark.parametrize(
    ("arguments", "recorded"),
    [
        ([], ["02_a", "03_b", "03_c"]),
        (["03"], ["03_b", "03_c"]),
        (["--only", "c"], ["03_c"]),
        (["all"], ["02_a", "03_b", "03_c"]),
    ],
)
def test_without_a_lesson_all_are_recorded(arguments, recorded, monkeypatch):
    lessons = {"02": {"02_a": []}, "03": {"03_b": [], "03_c": []}}
    names = []
    monkeypatch.setattr(command, "LESSON_RUNS", lessons)
    record = lambda name, experiments, command: names.append(name)  # noqa: E731
    monkeypatch.setattr(command, "record_family", record)
    command.main(arguments)
    assert names == recorded


def test_the_lists_are_well_formed():
    for lesson, families in LESSON_RUNS.items():
        for name, family in families.items():
            assert name.startswith(f"{lesson}_")
            if callable(family):
                continue
            keys = [(e.label, e.seed) for e in family]
            assert len(set(keys)) == len(keys), name
            for experiment in family:
                settings = experiment.settings()
                assert settings.get("learning_rate", 1) > 0
                untrained = isinstance(getattr(experiment, "method", None), UNTRAINED)
                assert settings.get("steps", 1) > 0 or untrained


def sweep_run(experiment, loss):
    metrics = {"final_eval_loss": loss}
    shared = {"label": experiment.label, "seed": experiment.seed, "metrics": metrics}
    return shared | {"settings": experiment.settings()}


def test_a_sweep_grows_until_each_best_rate_is_inside(monkeypatch):
    runs = []
    monkeypatch.setattr(records, "list_records", lambda: ["08_try"])
    monkeypatch.setattr(records, "load_record", lambda name: {"runs": runs})
    last = quick("prompting", steps=0)
    methods = {
        "full": ("full", 1e-3, {}),
        "LoRA": (LORA, 1e-2, {"quantization": "nf4"}),
    }
    family = sweep_family("08_try", methods, [last])
    # |log rate - peak| is the loss; LoRA's peak lies outside the first three rates
    peaks = {"full": -3, "LoRA": -4, "prompting": 0}
    made = []
    while True:
        left = [e for e in family() if (e.label, e.seed) not in made]
        if not left:
            break
        for one in left:
            distance = abs(math.log10(one.learning_rate) - peaks[one.label.split()[0]])
            runs.append(sweep_run(one, None if distance > 1.8 else distance))
            made.append((one.label, one.seed))
    assert family()[-1] == last
    tried = {(e.label, e.seed) for e in family()[:-1]}
    assert tried == {
        *((f"full lr {rate}", 0) for rate in ("0.0003", "0.001", "0.003")),
        *((f"LoRA lr {r}", 0) for r in ("3e-05", "0.0001", "0.0003", "0.001")),
        *((f"LoRA lr {r}", 0) for r in ("0.003", "0.01", "0.03")),
        *(
            (f"{best}", s)
            for best in ("full lr 0.001", "LoRA lr 0.0001")
            for s in (1, 2)
        ),
    }
    assert all(e.forgetting == bool(e.seed) for e in family()[:-1])
    assert all(e.quantization == "nf4" for e in family() if "LoRA" in e.label)
    other = {"budget": {"steps": 7}, "best_also": {"eval_examples": 5}}
    family = sweep_family("08_try", methods, **other)()
    assert {e.steps for e in family} == {7}
    assert all((e.eval_examples == 5) == bool(e.seed) for e in family)
    assert not any(e.forgetting for e in family)


def test_costs_are_measured_in_a_step_that_has_optimizer_state(small):
    run = run_training(quick("LoRA", LORA, costs=True, test_examples=3), progress=False)
    weights = 4 * random_llama().num_parameters()
    lora = run["measured"]
    assert weights < lora["peak_bytes"]
    # r = 2: an adapter is far smaller than the model it belongs to
    assert 4 * run["trainable_parameters"] < lora["adapter_bytes"] < weights
    assert "by_field" in run["metrics"]
    whole = run_training(quick(costs=True), progress=False)
    assert whole["measured"]["adapter_bytes"] == weights
    # gradients and AdamW's two moments of every weight are there too, not of LoRA's
    assert whole["measured"]["peak_bytes"] > lora["peak_bytes"] + 2 * weights


def test_a_model_without_chatml_is_asked_in_its_own_way():
    assert sweep_runs.template_for(byte_tokenizer()) == "chatml"
    other = copy.deepcopy(byte_tokenizer())
    other.chat_template = other.chat_template.replace("role'] + '\n'", "role'] + '>'")
    assert sweep_runs.template_for(other) == "tokenizer", (
        "its tokens alone are ChatML's"
    )
