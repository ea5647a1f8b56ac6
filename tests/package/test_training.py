"""Arguments, a model that is ready afterwards, resume after a kill, short memory."""

import gc
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    get_peft_model,
)
from small_models import byte_tokenizer, random_llama
from small_training import BF16, FP32, batch, build, wrapped
from training_child import STEPS, records
from transformers import GPT2Config, GPT2LMHeadModel, Trainer
from trl import SFTTrainer

from course_utils import runtime, training
from course_utils.formatting import CompletionCollator
from course_utils.memory import GIB, t4_plan
from course_utils.runtime import Profile
from course_utils.training import (
    LossHistory,
    OutOfMemory,
    _trainer_estimate,
    find_checkpoint,
    plan_settings,
    prepare_trainer,
    sft_config,
    training_arguments,
)

HERE = Path(__file__).parents[1]
T4 = Profile("t4", "cuda", torch.float16, 0)


# --- arguments ------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch):
    """Arguments for a card that is not here: nothing asks for the device."""
    import transformers.training_args as module

    monkeypatch.setattr(
        module.TrainingArguments, "device", property(lambda self: torch.device("cpu"))
    )


def test_sft_trainer_leaves_tokenized_records_as_they_are(tmp_path):
    trainer = build(SFTTrainer, tmp_path, random_llama())
    data = records()
    assert trainer.train_dataset["labels"][:] == data["labels"][:]
    assert trainer.train_dataset["input_ids"][:] == data["input_ids"][:]


def test_arguments_follow_the_profile(tmp_path):
    for make in (training_arguments, sft_config):
        args = make(FP32, tmp_path)
        assert (args.bf16, args.fp16, args.use_cpu) == (False, False, True)
        assert make(BF16, tmp_path).bf16
        assert not args.gradient_checkpointing and args.disable_tqdm
        assert args.report_to in ([], "none") and args.save_strategy == "no"
        assert make(FP32, tmp_path, seed=7, logging_steps=5).seed == 7
        assert make(FP32, tmp_path, gradient_checkpointing=True).gradient_checkpointing
        with pytest.raises(TypeError):
            make(FP32, tmp_path, no_such_setting=1)


def test_a_t4_gets_fp16_compute(card, tmp_path):
    for make in (training_arguments, sft_config):
        args = make(T4, tmp_path)
        assert args.fp16 is True and args.bf16 is False and not args.use_cpu


# --- before and after training --------------------------------------------------------


def test_freed_memory_is_kept_while_a_cpu_trains(tmp_path, monkeypatch):
    asked = []
    target = "course_utils.runtime.keep_freed_memory"
    monkeypatch.setattr(target, lambda: asked.append(1))
    prepare_trainer(build(SFTTrainer, tmp_path, random_llama()), fast=False)
    assert asked == [1]


@pytest.mark.parametrize("method", ["full", "lora", "prefix"])
@pytest.mark.parametrize("profile", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_trained_model_can_generate(method, profile, tmp_path, capsys):
    model = wrapped(method)
    trainer = build(SFTTrainer, tmp_path, model, profile)
    prepare_trainer(trainer, every=2)
    trainer.train()
    base = model.get_base_model() if method != "full" else model
    assert base.config.use_cache and not model.training
    assert base.config._attn_implementation == "sdpa"
    assert not hasattr(model, "_original_forward")
    assert not model._is_accelerate_prepared  # another training would miss autocast
    ids = torch.tensor([[5, 6, 7]])
    assert model.generate(input_ids=ids, max_new_tokens=3).shape[1] > 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" · ")[0] for line in lines] == [
        "step 1 of 4",
        "step 2 of 4",
        "step 4 of 4",
    ]
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_a_model_that_can_generate(
    error, tmp_path, monkeypatch
):
    model = wrapped("lora").to(torch.bfloat16)
    trainer = build(SFTTrainer, tmp_path, model, BF16)
    prepare_trainer(trainer)
    layer = next(m for m in model.modules() if hasattr(m, "lora_A"))
    config = model.get_base_model().config

    def stop(*_, **__):
        assert layer.cast_input_dtype_enabled is False
        assert config._attn_implementation == "eager" and model.training
        assert hasattr(model, "_original_forward")  # autocast
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("course_utils.training_speed.completion_loss", stop)
        with pytest.raises(error):
            trainer.train()
    assert layer.cast_input_dtype_enabled is True
    assert config._attn_implementation == "sdpa" and not model.training
    assert not hasattr(model, "_original_forward")
    with torch.no_grad():
        model(input_ids=batch(2)["input_ids"])
    trainer.train()  # and one that can be trained anew
    assert trainer.state.global_step == 4
    assert config._attn_implementation == "sdpa" and not model.training


def test_an_8_bit_training_leaves_nothing_to_the_next_one(tmp_path):
    from bitsandbytes.optim import AdamW8bit

    model = random_llama(vocab_size=512)
    embedding = weakref.ref(model.get_input_embeddings())
    trainer = build(SFTTrainer, tmp_path, model, optim="adamw_bnb_8bit", max_steps=1)
    prepare_trainer(trainer)
    trainer.train()
    weight = torch.nn.Parameter(torch.ones(8192))  # at the place of the embedding
    weight.grad = torch.ones(8192)
    optimizer = AdamW8bit([weight])
    optimizer.step()
    assert optimizer.state[weight]["state1"].dtype == torch.uint8
    del trainer, model
    gc.collect()
    assert embedding() is None


def test_history_reads_losses_and_validation_losses(tmp_path):
    trainer = build(
        SFTTrainer, tmp_path, random_llama(), eval_strategy="steps", eval_steps=2
    )
    prepare_trainer(trainer)
    trainer.train()
    history = LossHistory.from_trainer(trainer)
    assert history.steps == (1, 2, 3, 4) and history.eval_steps == (2, 4)
    assert all(value > 0 for value in history.loss + history.eval_loss)


# --- resume after a kill --------------------------------------------------------------


def child(folder, kill_at=None):
    command = [sys.executable, str(HERE / "training_child.py"), str(folder)]
    command += [str(kill_at)] if kill_at else []
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=HERE,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ["PYTHONPATH"]])},
    )
    if kill_at:
        assert done.returncode == -signal.SIGKILL, done.stderr
        return None
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_run_killed_three_times_ends_like_an_unbroken_one(tmp_path):
    unbroken = child(tmp_path / "whole")
    seed = random.randrange(10**6)
    draw, folder = random.Random(seed), tmp_path / "killed"
    kills = sorted(draw.sample(range(2, STEPS + 1), 3))
    for step in kills:
        child(folder, step)
    resumed = child(folder)
    note = f"killed at {kills} (seed {seed}), resumed from {resumed['from']}"
    assert unbroken["from"] is None
    assert resumed["from"] == f"checkpoint-{(kills[-1] - 1) // 3 * 3}" or kills[-1] < 4
    assert resumed["steps"] == unbroken["steps"] == list(range(1, STEPS + 1)), note
    assert resumed["loss"] == pytest.approx(unbroken["loss"], abs=1e-6), note
    assert resumed["weights"] == pytest.approx(unbroken["weights"], abs=1e-5), note


def test_resuming_loads_tensors_only(tmp_path, monkeypatch):
    settings = {"save_strategy": "steps", "save_steps": 2}
    trainer = build(SFTTrainer, tmp_path, wrapped("lora"), **settings)
    prepare_trainer(trainer)
    trainer.train()
    load, calls = torch.load, []

    def watched(*args, **kwargs):
        calls.append(kwargs.get("weights_only"))
        return load(*args, **kwargs)

    monkeypatch.setattr(torch, "load", watched)
    again = build(SFTTrainer, tmp_path, wrapped("lora"), max_steps=6, **settings)
    prepare_trainer(again)
    again.train(resume_from_checkpoint=find_checkpoint(tmp_path))
    assert calls and all(flag is True for flag in calls)
    assert LossHistory.from_trainer(again).steps == (1, 2, 3, 4, 5, 6)


# --- short memory: advice before the run and after a failure --------------------------


def prepared(folder, model=None, kind=SFTTrainer, optimizers=(None, None), **settings):
    make = sft_config if kind is SFTTrainer else training_arguments
    settings = {"per_device_train_batch_size": 8, "max_steps": 2} | settings
    trainer = kind(
        model=model or random_llama(),
        args=make(FP32, folder, **settings),
        train_dataset=records(),
        eval_dataset=records(8),
        data_collator=CompletionCollator(byte_tokenizer()),
        processing_class=byte_tokenizer(),
        optimizers=optimizers,
    )
    prepare_trainer(trainer)
    return trainer


def fail(trainer, error):
    def step(*_, **__):
        raise error

    trainer.training_step = step


def room(monkeypatch, trainer, share):
    """Leave the run this share of what the plan says it needs."""
    plan = _trainer_estimate(trainer)
    held = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    there = int(share * plan.total)
    monkeypatch.setattr(training, "_free_bytes", lambda device: there - held)
    return plan, there


def advised_settings(message):
    """The settings that a message tells to set, as numbers and words."""
    found = re.findall(r"(per_device\w+|gradient_\w+|optim)=(\w+|'\w+')", message)
    return {name: eval(value) for name, value in found}


def test_on_a_t4_the_planner_decides_about_8_bit_adamw(card, tmp_path):
    roomy = t4_plan("smollm2-135m", "lora", batch_size=8, sequence_length=256)
    assert roomy.fits("T4")
    args = sft_config(T4, tmp_path, **plan_settings(roomy, device="cuda"))
    assert args.optim == "adamw_torch_fused" and args.per_device_train_batch_size == 8
    size = {"batch_size": 8, "sequence_length": 576, "loss": "chunked"}
    tight = t4_plan("qwen2.5-0.5b", "full", **size)
    words, fitting = tight.cheapest_change("T4")
    assert not tight.fits("T4") and fitting.fits("T4")
    assert words == "the 8-bit optimizer"
    settings = plan_settings(fitting, device="cuda")
    for make in (sft_config, training_arguments):
        args = make(T4, tmp_path, **settings)
        assert args.optim == "paged_adamw_8bit" and not args.gradient_checkpointing
        assert (args.fp16, args.bf16) == (True, False)
        assert args.per_device_train_batch_size == 8


def test_settings_keep_the_examples_of_a_step():
    plan = t4_plan("smollm2-135m", "lora", batch_size=2, sequence_length=64)
    settings = plan_settings(plan, device="cpu", examples=16)
    assert settings["per_device_train_batch_size"] == 2
    assert settings["gradient_accumulation_steps"] == 8
    eight = t4_plan(
        *("smollm2-135m", "lora"),
        **{"batch_size": 2, "sequence_length": 64, "optimizer": "adamw_8bit"},
    )
    assert plan_settings(eight, device="cuda")["optim"] == "paged_adamw_8bit"
    assert plan_settings(eight, device="cpu")["optim"] == "adamw_bnb_8bit"
    assert plan_settings(plan, device="mps")["optim"] == "adamw_torch"


def test_a_full_card_gives_settings_that_fit(monkeypatch, tmp_path):
    trainer = prepared(tmp_path)
    plan, there = room(monkeypatch, trainer, 0.7)
    fail(trainer, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    with pytest.raises(OutOfMemory, match="The cheapest change is") as caught:
        trainer.train()
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    settings = advised_settings(str(caught.value))
    batch = settings["per_device_train_batch_size"]
    assert batch < 8 and batch * settings["gradient_accumulation_steps"] == 8
    again = prepared(tmp_path, **settings)
    assert _trainer_estimate(again).total <= there < plan.total
    again.train()


def test_a_real_failure_of_the_cpu_allocator_is_recognised(tmp_path):
    trainer = prepared(tmp_path)
    trainer.training_step = lambda *_, **__: torch.empty(2**55)
    with pytest.raises(OutOfMemory, match="per_device_train_batch_size=") as caught:
        trainer.train()
    assert "can't allocate" in str(caught.value.__cause__)


def test_a_failure_where_the_plan_fits_says_to_restart(monkeypatch, tmp_path):
    trainer = prepared(tmp_path)
    room(monkeypatch, trainer, 3)
    fail(trainer, MemoryError())
    with pytest.raises(OutOfMemory, match="restart the kernel.*20 % less.*batch"):
        trainer.train()


def test_other_errors_pass_as_they_are(tmp_path):
    trainer = prepared(tmp_path)
    fail(trainer, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="^shapes do not match$"):
        trainer.train()


def test_without_a_formula_the_batch_is_halved(tmp_path):
    config = GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config)
    trainer = prepared(tmp_path, model, Trainer, gradient_accumulation_steps=2)
    assert _trainer_estimate(trainer) is None
    fail(trainer, torch.OutOfMemoryError("CUDA out of memory"))
    words = "Set per_device_train_batch_size=4, gradient_accumulation_steps=4"
    with pytest.raises(OutOfMemory, match=words):
        trainer.train()
    trainer.args.per_device_train_batch_size = 1
    with pytest.raises(OutOfMemory, match="smaller model"):
        trainer.train()


def test_evaluation_names_its_own_batch(tmp_path):
    trainer = prepared(tmp_path, per_device_eval_batch_size=16)

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer.prediction_step = full
    words = r"per_device_eval_batch_size=8 \(now 16\)"
    with pytest.raises(OutOfMemory, match=words):
        trainer.evaluate()
    trainer.args.eval_strategy = "steps"
    trainer.args.eval_steps = 1
    with pytest.raises(OutOfMemory, match=words):
        trainer.train()


def test_little_memory_is_said_before_step_1(monkeypatch, tmp_path, capsys):
    trainer = prepared(tmp_path)
    room(monkeypatch, trainer, 0.7)
    trainer.train()
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("Memory may run out.") and "batch" in first
    room(monkeypatch, trainer, 1.5)
    trainer.train()
    assert "Memory" not in capsys.readouterr().out


def test_a_run_that_cannot_begin_does_not(monkeypatch, tmp_path):
    trainer = prepared(tmp_path)
    plan = _trainer_estimate(trainer)
    room(monkeypatch, trainer, 0.9 * plan.static / plan.total)
    with pytest.raises(OutOfMemory, match="not enough memory for this run"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_what_a_first_training_has_left_counts_as_there(monkeypatch, tmp_path):
    trainer = prepared(tmp_path)
    weights = training._held_bytes(trainer)
    trainer.train()
    held = training._held_bytes(trainer)
    assert held >= 3 * weights  # and AdamW's two averages
    there = int(1.02 * _trainer_estimate(trainer).total)
    monkeypatch.setattr(training, "_free_bytes", lambda device: there - held)
    trainer.train()


def test_an_optimizer_of_ones_own_is_not_refused(monkeypatch, tmp_path, capsys):
    model = random_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = prepared(tmp_path, model, optimizers=(optimizer, None))
    plan = _trainer_estimate(trainer)
    room(monkeypatch, trainer, 0.9 * plan.static / plan.total)
    trainer.train()
    assert "Memory may run out." in capsys.readouterr().out


def test_the_estimate_is_of_this_trainer(tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(random_llama(), config)
    plan = _trainer_estimate(prepared(tmp_path, model, optim="adamw_bnb_8bit"))
    request = plan.request
    assert (request.method, request.batch_size) == ("lora", 8)
    assert request.sequence_length == max(map(len, records()["input_ids"]))
    assert (request.optimizer, request.loss) == ("adamw_8bit", "chunked")
    assert plan.trainable == model.get_nb_trainable_parameters()[0]
    assert _trainer_estimate(prepared(tmp_path)).request.method == "full"


def test_free_memory_is_what_the_system_says():
    assert GIB / 100 < training._free_bytes("cpu") < 2**50


def test_what_the_process_has_freed_and_kept_counts_as_free(monkeypatch):
    asked = []
    monkeypatch.setattr(runtime, "give_back_memory", lambda: asked.append(1))
    training._free_bytes("cpu")
    assert asked


def test_advice_keeps_the_examples_of_a_step(tmp_path):
    for size, steps in ((5, 1), (6, 1), (7, 2)):
        trainer = prepared(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        told = advised_settings(training._advice(trainer.args, None, 0))
        assert told["per_device_train_batch_size"] <= size // 2
        assert math.prod(told.values()) == size * steps
    plan = t4_plan("smollm2-135m", "lora", batch_size=2, sequence_length=128)
    told = plan_settings(plan, device="cuda", examples=5)
    assert told["gradient_accumulation_steps"] == 3


def test_the_warning_plans_the_attention_that_runs(tmp_path):
    assert _trainer_estimate(prepared(tmp_path)).request.attention == "eager"
    trainer = prepared(tmp_path, per_device_train_batch_size=1)
    trainer.callback_handler.callbacks.clear()
    assert _trainer_estimate(trainer).request.attention == "sdpa"
    trainer.args.fp16 = True  # a T4, and grouped-query attention without padding
    trainer.model.config.num_key_value_heads = 1
    assert _trainer_estimate(trainer).request.attention == "math"
