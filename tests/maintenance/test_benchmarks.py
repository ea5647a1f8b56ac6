"""The benchmark's arithmetic and what it does on tiny models. No second is judged."""

import copy
import dataclasses
import doctest
import importlib
import json
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
from recomputing import differences
from small_models import byte_tokenizer, random_llama

from course_utils import records
from course_utils.formatting import generation_prompt
from course_utils.models import SMOLLM2
from course_utils.runtime import Profile
from maintenance import readme
from maintenance.benchmarks import __main__ as command
from maintenance.benchmarks import paths, products, rivals, summary
from maintenance.benchmarks import training as trainings
from maintenance.benchmarks.summary import (
    kind_of,
    shares,
    speed,
    spread,
    summarise,
    table,
)
from maintenance.store import save_record

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


def pins_of(name):
    lines = (ROOT / "maintenance/benchmarks" / name).read_text().split()
    assert all("==" in line for line in lines)
    return dict(line.split("==") for line in lines)


def test_others_are_pinned_and_their_model_is_ours():
    pins = pins_of("others.txt")
    assert {"torchao", "xllamacpp"} < pins.keys()
    assert pins[SMOLLM2.package] == SMOLLM2.version


def test_the_environment_of_litgpt_is_pinned():
    pins = pins_of("litgpt.txt")
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


LAYERS = 2


@pytest.fixture
def small(monkeypatch):
    """A tiny random model and a tokenizer of bytes in place of the built-in ones."""

    def load(name=None, *, dtype=None, quantization=None):
        torch.manual_seed(0)
        return random_llama(num_hidden_layers=LAYERS).to(dtype or torch.float32)

    for module in (trainings, rivals):
        monkeypatch.setattr(module, "load_tokenizer", byte_tokenizer)
    for module in (paths, rivals):
        monkeypatch.setattr(module, "load_model", load)
    profile = Profile("cpu", "cpu", torch.float32, 0)
    monkeypatch.setattr(paths, "get_profile", lambda: profile)
    monkeypatch.setattr(products, "PATIENCE_S", 0.0)
    trainings.training_data.cache_clear()
    yield
    trainings.training_data.cache_clear()


def test_the_products_of_a_step_are_all_listed(small, monkeypatch):
    listed = []
    monkeypatch.setattr(
        products.AfterEachStep,
        "_make_ready",
        lambda self, own: listed.append(self.listing) or {"float32": [], "others": []},
    )
    run = products.run_products(3)
    # Seven layers a block and the head, forward and backward; the first block's q, k
    # and v pass no gradient on.
    assert listed[0].frozen.total() == 2 * (7 * LAYERS + 1) - 3
    # Seven adapters a block of two matrices each, and attention's two products.
    forward = 14 * LAYERS, 2 * LAYERS
    assert listed[0].others.total() >= 2 * sum(forward)
    shapes = listed[0].frozen.items()
    assert run["measured"]["operations"]["frozen"] == sum(
        2 * m * k * n * times for (m, k, n), times in shapes
    )
    assert len(run["measured"]["step_s"]) == 1, "the second step is only listed"


def test_products_are_timed_in_each_arithmetic_that_runs(small, monkeypatch):
    def refuse(shape):
        raise RuntimeError("no such kernel\nat all")

    monkeypatch.setitem(products.ARITHMETIC, "int8, _int_mm", refuse)
    run = products.run_products(4)
    run["settings"] = {"part": "products", "name": "step"}
    assert run["measured"]["failed"]["int8, _int_mm"] == "no such kernel"
    assert set(run["measured"]["product_s"]) >= {"float32", "bfloat16", "others"}
    found = summarise([run])["products"]
    assert found["share"]["rounds"] == 2
    assert found["share_with_others"]["median"] > found["share"]["median"]
    assert "no such kernel" in "\n".join(table(summarise([run])))


@pytest.mark.parametrize("name", products.ARITHMETIC)
def test_a_product_has_its_shape(name):
    try:
        product = products.ARITHMETIC[name]((24, 32, 16))()
    except RuntimeError as error:
        pytest.skip(f"{name}: {error}")
    assert product.shape == (24, 16)


def test_a_product_is_computed_often_enough(monkeypatch):
    done = []
    monkeypatch.setattr(products, "PATIENCE_S", 1e9)
    products.seconds_of(lambda: done.append(1), 5)
    assert len(done) == 5
    monkeypatch.setattr(products, "PATIENCE_S", 0.0)
    products.seconds_of(lambda: done.append(1), 5)
    assert len(done) == 6


def test_each_step_beside_company_sees_the_same_records(small):
    rows, _ = trainings.same_records(2)
    assert len(rows) == 3 * paths.EXAMPLES
    assert rows[: paths.EXAMPLES] == rows[paths.EXAMPLES : 2 * paths.EXAMPLES]


def test_a_compiled_block_computes_the_same(small, monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "prepare", lambda bundle: tmp_path / "model")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled, compile_module = [], torch.nn.Module.compile

    def compile_eagerly(module, **options):
        compiled.append(type(module).__name__)
        compile_module(module, backend="eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    run = trainings.run_pairs("lora", 2, bare={"compiled": True})
    assert compiled == ["LlamaDecoderLayer"] * LAYERS
    plain = trainings.run_pairs("lora", 2)
    losses = [r["measured"]["bare_loop_loss"] for r in (run, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_without_a_compiler_a_line_says_so(monkeypatch):
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setenv("CXX", "no-such-compiler")
    run = trainings.run_block(3)
    run["settings"] = {"part": "block", "name": "compiled"}
    lines = "\n".join(table(summarise([run])))
    assert "compiled block: there is no C++ compiler" in lines


def test_pairs_end_at_the_limit(small):
    run = trainings.run_pairs("lora", 3, limit_s=0.0)
    assert len(run["measured"]["course_s"]) == len(run["loss"]) == 1
    run["settings"] = {"part": "int8", "name": "slow"}
    found = summarise([run])["int8"]["slow"]
    assert found["course_against"]["rounds"] == 1 and not found["trains"]


def test_a_library_that_fails_is_recorded_by_its_error(monkeypatch):
    stderr = "Traceback:\n  File\nNotImplementedError: no kernel\nWarning: much else\n"
    done = subprocess.CompletedProcess([], 1, "", stderr)
    monkeypatch.setattr(rivals.subprocess, "run", lambda *args, **options: done)
    run = rivals.beside("layers", "torchao, weights", 3)
    assert run["measured"] == {"failed": "NotImplementedError: no kernel"}
    run["settings"] = {"part": "int8", "name": "torchao, weights"}
    lines = "\n".join(table(summarise([run])))
    assert "8-bit layers of torchao, weights: NotImplementedError: no kernel" in lines
    done.stderr = ""
    assert rivals.beside("server", "x", 3)["measured"] == {"failed": "ended with 1"}


def test_whether_other_layers_train_is_read_off_their_losses():
    run = beside("bitsandbytes", [9.0, 1.0, 1.0], [9.0, 4.0, 4.0], part="int8")
    run["measured"]["bare_loop_loss"], run["loss"] = [2.0, 1.5, 1.0], [2.0, 1.5, 1.1]
    found = summarise([run])["int8"]["bitsandbytes"]
    assert found["course_against"]["median"] == 8.0 and found["trains"]
    assert found["loss_from_course"] == pytest.approx(0.1)
    run["measured"]["bare_loop_loss"] = [2.0, 2.0, 2.0]
    assert not summarise([run])["int8"]["bitsandbytes"]["trains"]


def test_the_server_gets_the_prompts_that_the_course_gets(small, monkeypatch):
    asked, answered = [], []
    generate = rivals.inference.generate

    def watched(model, tokenizer, prompts, **options):
        rows = [generation_prompt(prompt, tokenizer) for prompt in prompts]
        answered.extend(rows)
        assert options["max_new_tokens"] == rivals.NEW_TOKENS
        assert not rivals.inference._stop_ids(model, tokenizer, "chatml")
        return generate(model, tokenizer, prompts, **options | {"max_new_tokens": 1})

    monkeypatch.setattr(rivals.inference, "generate", watched)
    tokens = rivals.NEW_TOKENS

    def ask(ids):
        asked.append(ids)
        return {"usage": {"completion_tokens": tokens}}

    run = rivals.server("llama.cpp", 2, ask)
    assert len(asked) == 2 * rivals.TOGETHER and sorted(asked) == sorted(answered)
    run["settings"] = {"part": "server", "name": "llama.cpp"}
    run["measured"] |= {"course_s": [9.0, 2.0], "server_s": [9.0, 1.0]}
    found = summarise([run])["server"]
    assert found["course_against"]["median"] == 0.5
    assert found["s_each"]["median"] == 2.0 / rivals.TOGETHER
    tokens -= 1
    with pytest.raises(RuntimeError, match="not 32"):
        rivals.server("llama.cpp", 1, ask)


def test_a_gguf_file_is_written_again_in_eight_bits(tmp_path):
    from gguf import GGMLQuantizationType as Types
    from gguf import GGUFReader, GGUFWriter, dequantize, quantize

    values = numpy.random.default_rng(0).normal(size=(4, 64)).astype(numpy.float32)
    writer = GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_block_count(3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_file_type(3)
    writer.add_tensor("w", quantize(values, Types.Q4_1), raw_dtype=Types.Q4_1)
    writer.add_tensor("norm", values[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    rivals.as_q8_0(tmp_path / "a.gguf", tmp_path / "b.gguf")
    old, new = (GGUFReader(tmp_path / f"{name}.gguf") for name in "ab")
    assert old.fields.keys() == new.fields.keys()
    for name in ("llama.block_count", "tokenizer.ggml.tokens"):
        assert old.fields[name].contents() == new.fields[name].contents()
    kinds = {tensor.name: tensor.tensor_type for tensor in new.tensors}
    assert kinds == {"w": Types.Q8_0, "norm": Types.F32}
    was, now = (
        dequantize(tensor.data, tensor.tensor_type)
        for tensor in (old.tensors[0], new.tensors[0])
    )
    assert now.shape == values.shape
    assert 0 < numpy.abs(was - now).max() < 0.02


def test_a_part_takes_the_place_of_its_own_in_the_record(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(records, "runs_folder", lambda: tmp_path)
    monkeypatch.setattr(command, "hardware", lambda: {"processor": "first"})
    lesson = training("00", 0, 1.0, part="lessons")
    runs.append(lesson)
    command.record_parts(runs, command.PARTS)
    first = records.load_record("bench")
    assert first["runs"] == runs and first["hardware"] == {"processor": "first"}
    monkeypatch.setattr(command, "hardware", lambda: {"processor": "second"})
    new = [beside("course and bare loop", [9.0, 2.0], [9.0, 2.0], part="pairs")]
    command.record_parts([*new, lesson | {"seconds": 1.0}], ["pairs"])
    saved = records.load_record("bench")
    assert differences(saved) == [] and saved["hardware"] == {"processor": "first"}
    *kept, last = saved["runs"]
    assert kept == [run for run in runs if run["settings"]["part"] != "pairs"]
    assert last["machine"]["hardware"] == {"processor": "second"}
    assert saved["summary"]["course_against_bare_loop"]["lora"]["median"] == 2.0
    assert saved["seconds"] == pytest.approx(sum(r["seconds"] for r in saved["runs"]))
    command.record_parts(runs, command.PARTS)
    assert records.load_record("bench")["hardware"] == {"processor": "second"}


def test_every_part_has_a_task():
    tasks = command.tasks_of(command.PARTS, paths.METHODS, 3, 3)
    assert {task.part for task in tasks} == set(command.PARTS)
