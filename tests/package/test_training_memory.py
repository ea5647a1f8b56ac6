"""Short memory: the planner's advice before the run and after a failure."""

import math
import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from small_models import byte_tokenizer, random_llama
from training_child import records
from transformers import GPT2Config, GPT2LMHeadModel, Trainer
from trl import SFTTrainer

from course_utils import training as training_memory
from course_utils.formatting import CompletionCollator
from course_utils.memory import GIB, t4_plan
from course_utils.runtime import Profile
from course_utils.training import (
    OutOfMemory,
    plan_settings,
    prepare_trainer,
    sft_config,
    trainer_estimate,
    training_arguments,
)

FP32 = Profile("cpu", "cpu", torch.float32, 0)
T4 = Profile("t4", "cuda", torch.float16, 0)


def build(folder, model=None, kind=SFTTrainer, optimizers=(None, None), **settings):
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
    plan = trainer_estimate(trainer)
    held = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    there = int(share * plan.total)
    monkeypatch.setattr(training_memory, "free_bytes", lambda device: there - held)
    return plan, there


def advised_settings(message):
    """The settings that a message tells to set, as numbers and words."""
    found = re.findall(r"(per_device\w+|gradient_\w+|optim)=(\w+|'\w+')", message)
    return {name: eval(value) for name, value in found}


# --- the settings of a plan -------------------------------------------------------


@pytest.fixture
def card(monkeypatch):
    """Arguments for a card that is not here: nothing asks for the device."""
    import transformers.training_args as module

    monkeypatch.setattr(
        module.TrainingArguments, "device", property(lambda self: torch.device("cpu"))
    )


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


# --- when it has run out ------------------------------------------------------------


def test_a_full_card_gives_settings_that_fit(monkeypatch, tmp_path):
    trainer = build(tmp_path)
    plan, there = room(monkeypatch, trainer, 0.7)
    fail(trainer, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    with pytest.raises(OutOfMemory, match="The cheapest change is") as caught:
        trainer.train()
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    settings = advised_settings(str(caught.value))
    batch = settings["per_device_train_batch_size"]
    assert batch < 8 and batch * settings["gradient_accumulation_steps"] == 8
    again = build(tmp_path, **settings)
    assert trainer_estimate(again).total <= there < plan.total
    again.train()


def test_a_real_failure_of_the_cpu_allocator_is_recognised(tmp_path):
    trainer = build(tmp_path)
    trainer.training_step = lambda *_, **__: torch.empty(2**55)
    with pytest.raises(OutOfMemory, match="per_device_train_batch_size=") as caught:
        trainer.train()
    assert "can't allocate" in str(caught.value.__cause__)


def test_a_failure_where_the_plan_fits_says_to_restart(monkeypatch, tmp_path):
    trainer = build(tmp_path)
    room(monkeypatch, trainer, 3)
    fail(trainer, MemoryError())
    with pytest.raises(OutOfMemory, match="restart the kernel.*20 % less.*batch"):
        trainer.train()


def test_other_errors_pass_as_they_are(tmp_path):
    trainer = build(tmp_path)
    fail(trainer, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="^shapes do not match$"):
        trainer.train()


def test_without_a_formula_the_batch_is_halved(tmp_path):
    config = GPT2Config(vocab_size=259, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config)
    trainer = build(tmp_path, model, Trainer, gradient_accumulation_steps=2)
    assert trainer_estimate(trainer) is None
    fail(trainer, torch.OutOfMemoryError("CUDA out of memory"))
    words = "Set per_device_train_batch_size=4, gradient_accumulation_steps=4"
    with pytest.raises(OutOfMemory, match=words):
        trainer.train()
    trainer.args.per_device_train_batch_size = 1
    with pytest.raises(OutOfMemory, match="smaller model"):
        trainer.train()


def test_evaluation_names_its_own_batch(tmp_path):
    trainer = build(tmp_path, per_device_eval_batch_size=16)

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


# --- before it runs out -------------------------------------------------------------


def test_little_memory_is_said_before_step_1(monkeypatch, tmp_path, capsys):
    trainer = build(tmp_path)
    room(monkeypatch, trainer, 0.7)
    trainer.train()
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("Memory may run out.") and "batch" in first
    room(monkeypatch, trainer, 1.5)
    trainer.train()
    assert "Memory" not in capsys.readouterr().out


def test_a_run_that_cannot_begin_does_not(monkeypatch, tmp_path):
    trainer = build(tmp_path)
    plan = trainer_estimate(trainer)
    room(monkeypatch, trainer, 0.9 * plan.static / plan.total)
    with pytest.raises(OutOfMemory, match="not enough memory for this run"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_what_a_first_training_has_left_counts_as_there(monkeypatch, tmp_path):
    trainer = build(tmp_path)
    weights = training_memory._held_bytes(trainer)
    trainer.train()
    held = training_memory._held_bytes(trainer)
    assert held >= 3 * weights  # and AdamW's two averages
    there = int(1.02 * trainer_estimate(trainer).total)
    monkeypatch.setattr(training_memory, "free_bytes", lambda device: there - held)
    trainer.train()


def test_an_optimizer_of_ones_own_is_not_refused(monkeypatch, tmp_path, capsys):
    model = random_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = build(tmp_path, model, optimizers=(optimizer, None))
    plan = trainer_estimate(trainer)
    room(monkeypatch, trainer, 0.9 * plan.static / plan.total)
    trainer.train()
    assert "Memory may run out." in capsys.readouterr().out


def test_the_estimate_is_of_this_trainer(tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(random_llama(), config)
    plan = trainer_estimate(build(tmp_path, model, optim="adamw_bnb_8bit"))
    request = plan.request
    assert (request.method, request.batch_size) == ("lora", 8)
    assert request.sequence_length == max(map(len, records()["input_ids"]))
    assert (request.optimizer, request.loss) == ("adamw_8bit", "chunked")
    assert plan.trainable == model.get_nb_trainable_parameters()[0]
    assert trainer_estimate(build(tmp_path)).request.method == "full"


def test_free_memory_is_what_the_system_says():
    free = training_memory.free_bytes("cpu")
    assert free is None or GIB / 100 < free < 2**50


def test_what_the_process_has_freed_and_kept_counts_as_free(monkeypatch):
    pytest.importorskip("psutil")
    asked = []
    monkeypatch.setattr(training_memory, "give_back_memory", lambda: asked.append(1))
    training_memory.free_bytes("cpu")
    assert asked


def test_advice_keeps_the_examples_of_a_step(tmp_path):
    for batch, steps in ((5, 1), (6, 1), (7, 2)):
        trainer = build(
            tmp_path,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
        )
        told = advised_settings(training_memory.advice(trainer, None, None))
        assert told["per_device_train_batch_size"] <= batch // 2
        assert math.prod(told.values()) == batch * steps
    plan = t4_plan("smollm2-135m", "lora", batch_size=2, sequence_length=128)
    told = plan_settings(plan, device="cuda", examples=5)
    assert told["gradient_accumulation_steps"] == 3


def test_the_warning_plans_the_attention_that_runs(tmp_path):
    assert trainer_estimate(build(tmp_path)).request.attention == "eager"
    trainer = build(tmp_path, per_device_train_batch_size=1)
    trainer.callback_handler.callbacks.clear()
    assert trainer_estimate(trainer).request.attention == "sdpa"
    trainer.args.fp16 = True  # a T4, and grouped-query attention without padding
    trainer.model.config.num_key_value_heads = 1
    assert trainer_estimate(trainer).request.attention == "math"
