"""Training: the same losses with less work, arguments, checks, resume after a kill."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file
from small_models import byte_tokenizer, random_llama
from training_child import STEPS, records
from transformers import EarlyStoppingCallback, Trainer
from trl import SFTTrainer

from course_utils import training_callbacks as callbacks
from course_utils.formatting import CompletionCollator
from course_utils.runtime import Profile
from course_utils.training import (
    LossHistory,
    completion_loss,
    find_checkpoint,
    fix_trainable_dtype,
    prepare_trainer,
    sft_config,
    training_arguments,
)
from course_utils.training_speed import (
    PACKABLE,
    SeededBatches,
    shared_beginning,
    without_padding,
)

HERE = Path(__file__).parents[1]
FP32 = Profile("cpu", "cpu", torch.float32, 0)
BF16 = Profile("cpu", "cpu", torch.bfloat16, 0)


def begun(row, beginning):
    """The same record, after so many tokens that all begin with."""
    ids = [*range(50, 50 + beginning), *row["input_ids"]]
    labels = [-100] * beginning + row["labels"]
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}


def batch(count=5, beginning=0):
    rows = [begun(row, beginning) for row in records(count)]
    return CompletionCollator(byte_tokenizer())(rows)


def build(kind, folder, model, profile=FP32, **settings):
    make = training_arguments if kind is Trainer else sft_config
    settings = {"max_steps": 4, "per_device_train_batch_size": 4} | settings
    return kind(
        model=model,
        args=make(profile, folder, **{"learning_rate": 1e-2} | settings),
        train_dataset=records(),
        eval_dataset=records(8, seed=9),
        data_collator=CompletionCollator(byte_tokenizer()),
        processing_class=byte_tokenizer(),
    )


def wrapped(method):
    model = random_llama(initializer_range=0.05)
    configs = {
        "lora": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        "prompt": PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
        "prefix": PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    }
    torch.manual_seed(4)
    return get_peft_model(model, configs[method]) if method in configs else model


# --- the same loss and the same gradients -------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora", "prompt", "prefix"])
def test_completion_loss_and_its_gradients_are_the_models_own(method):
    model, data = wrapped(method).train(), batch()
    own = model(**data).loss
    own.backward()
    expected = {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }
    model.zero_grad()
    ours = completion_loss(model, data)
    ours.backward()
    assert ours.item() == pytest.approx(own.item(), abs=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            dict(model.named_parameters())[name].grad, gradient, atol=1e-6, rtol=1e-4
        )
    assert expected


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("beginning", [0, 12])
def test_a_batch_without_padding_has_the_same_loss_and_gradients(
    method, attention, beginning
):
    model, data = wrapped(method).train(), batch(9, beginning)
    base = model.get_base_model() if method == "lora" else model
    base.set_attn_implementation(attention)
    packed = without_padding(model, data)
    assert ("attention_mask" in packed) == bool(beginning)
    share = packed["input_ids"].numel() / data["input_ids"].numel()
    assert share < (0.6 if beginning else 0.8)
    losses, gradients = [], []
    for one in (data, packed):
        model.zero_grad()
        losses.append(completion_loss(model, one))
        losses[-1].backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)
    for padded, unpadded in zip(*gradients, strict=True):
        torch.testing.assert_close(padded, unpadded, atol=1e-6, rtol=1e-4)
    # Without what tells them apart the examples see each other: the loss is another.
    for lost in packed.keys() - {"input_ids", "labels"}:
        leaking = {k: v for k, v in packed.items() if k != lost}
        assert abs(completion_loss(model, leaking).item() - losses[0].item()) > 1e-4


@pytest.mark.parametrize("kind", sorted(PACKABLE))
@pytest.mark.parametrize("beginning", [0, 12])
def test_each_kind_of_model_that_is_packed_keeps_examples_apart(kind, beginning):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes, **heads, initializer_range=0.2)
    model = AutoModelForCausalLM.from_config(config)
    data = batch(9, beginning)
    packed = without_padding(model, data)
    # A window over the last tokens is the model's own mask, which ours would replace.
    assert ("attention_mask" in packed) == bool(beginning and kind != "mistral")
    assert "position_ids" in packed
    expected = completion_loss(model, data).item()
    assert completion_loss(model, packed).item() == pytest.approx(expected, abs=1e-5)
    leaking = {k: v for k, v in packed.items() if k != "position_ids"}
    assert abs(completion_loss(model, leaking).item() - expected) > 1e-3


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


@pytest.mark.parametrize("fast", [True, False])  # False: TRL's loss, as on a card
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("beginning", [0, 12])
def test_an_evaluation_after_training_computes_as_one_within(
    method, fast, beginning, tmp_path
):
    model = wrapped(method)
    if method == "lora":
        model.base_model.to(torch.bfloat16)  # prepare_trainer puts adapters back
    more = {"eval_strategy": "steps", "eval_steps": 4, "max_steps": 4}
    trainer = build(SFTTrainer, tmp_path, model, BF16, **more)
    rows = trainer.train_dataset.map(begun, fn_kwargs={"beginning": beginning})
    trainer.train_dataset = trainer.eval_dataset = rows
    prepare_trainer(trainer, fast=fast)
    trainer.train()
    within = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    # attention is the model's own again, which rounds a little otherwise
    assert trainer.evaluate()["eval_loss"] == pytest.approx(within[-1], rel=1e-4)


def test_freed_memory_is_kept_while_a_cpu_trains(tmp_path, monkeypatch):
    asked = []
    target = "course_utils.runtime.keep_freed_memory"
    monkeypatch.setattr(target, lambda: asked.append(1))
    prepare_trainer(build(SFTTrainer, tmp_path, random_llama()), fast=False)
    assert asked == [1]


def test_batches_that_cannot_be_packed_stay_padded():
    data = batch(9)
    assert without_padding(wrapped("prompt"), data) is data
    assert without_padding(wrapped("prefix"), data) is data
    model = random_llama()
    more = data | {"token_type_ids": torch.zeros_like(data["labels"])}
    assert without_padding(model, more) is more
    alike = {name: values[:1].repeat(3, 1) for name, values in data.items()}
    width = int(alike["attention_mask"][0].sum())
    alike = {name: values[:, :width] for name, values in alike.items()}
    assert without_padding(model, alike)["input_ids"].numel() == 3 * width
    few = without_padding(model, batch(9, beginning=7))
    assert "position_ids" in few and "attention_mask" not in few
    model.config.model_type = "gpt2"
    assert without_padding(model, data) is data


def test_a_beginning_is_shared_as_far_as_nothing_in_it_is_learned():
    def example(ids, unlearned):
        return {"input_ids": ids, "labels": [-100] * unlearned + ids[unlearned:]}

    long, other = example([4, 5, 6, 7, 8, 9], 5), example([4, 5, 6, 7, 3, 2], 5)
    assert shared_beginning([long, other]) == 4
    assert shared_beginning([long, example([4, 5, 6, 7, 3], 4)]) == 3
    assert shared_beginning([long, example([4, 5, 6, 7], 0)]) == 0  # the first learned
    assert shared_beginning([long, example([3, 5], 2)]) == 0
    assert shared_beginning([long, example([4, 5], 2)]) == 1  # a position is left
    assert shared_beginning([long]) == 0


def test_completion_loss_counts_what_it_is_told_to():
    model, data = random_llama(), batch()
    learned = (data["labels"][:, 1:] != -100).sum()
    mean, summed = completion_loss(model, data), completion_loss(model, data, 1)
    torch.testing.assert_close(mean * learned, summed)
    nothing = data | {"labels": torch.full_like(data["labels"], -100)}
    assert completion_loss(model, nothing).item() == 0


def test_the_output_layer_sees_learned_positions_only():
    model, data, seen = random_llama(), batch(), []
    model.lm_head.register_forward_hook(lambda m, a, out: seen.append(out.shape[0]))
    completion_loss(model, data)
    assert seen == [int((data["labels"][:, 1:] != -100).sum())]
    model(**data)
    assert seen[1:] == [5]  # the hook is gone: whole rows again


@pytest.mark.parametrize("kind", [Trainer, SFTTrainer])
@pytest.mark.parametrize("method", ["full", "lora", "prompt"])
def test_losses_of_a_fast_run_equal_those_of_the_library(kind, method, tmp_path):
    runs = []
    for fast in (False, True):
        trainer = build(kind, tmp_path, wrapped(method), gradient_accumulation_steps=2)
        prepare_trainer(trainer, fast=fast)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        runs.append([before, *LossHistory.from_trainer(trainer).loss])
    assert len(runs[0]) == 5 and runs[0][-1] != runs[0][1]
    assert max(abs(a - b) for a, b in zip(*runs, strict=True)) < 1e-4


def test_length_groups_are_a_permutation_by_seed_and_epoch_and_save_padding():
    draw = random.Random(0)
    lengths = [draw.randrange(10, 80) for _ in range(333)]
    groups = SeededBatches(lengths, 8, seed=1, together=50)
    first = list(groups)
    assert sorted(first) == list(range(333)) and first == list(groups)
    groups.set_epoch(1)
    assert list(groups) != first and sorted(groups) == list(range(333))
    assert list(SeededBatches(lengths, 8, seed=2, together=50)) != first

    def padded(order):
        cuts = [order[i : i + 8] for i in range(0, len(order), 8)]
        return sum(len(c) * max(lengths[i] for i in c) for c in cuts)

    assert padded(first) < 1.06 * sum(lengths) < padded(list(range(333)))


def test_sft_trainer_leaves_tokenized_records_as_they_are(tmp_path):
    trainer = build(SFTTrainer, tmp_path, random_llama())
    data = records()
    assert trainer.train_dataset["labels"][:] == data["labels"][:]
    assert trainer.train_dataset["input_ids"][:] == data["input_ids"][:]


# --- arguments ------------------------------------------------------------------------


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


def test_a_t4_gets_fp16_compute(tmp_path, monkeypatch):
    """Build the arguments of a card that is not here: no device is asked for."""
    import transformers.training_args as module

    monkeypatch.setattr(
        module.TrainingArguments, "device", property(lambda self: torch.device("cpu"))
    )
    t4 = Profile("t4", "cuda", torch.float16, 0)
    for make in (training_arguments, sft_config):
        args = make(t4, tmp_path)
        assert args.fp16 is True and args.bf16 is False and not args.use_cpu


# --- before and after training --------------------------------------------------------


def test_trainable_parameters_are_made_float32(tmp_path):
    model = wrapped("lora")
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="lora_A.*bfloat16.*fix_trainable_dtype"):
        callbacks.check_trainable(model, fp16=True)
    assert fix_trainable_dtype(model) > 0 == fix_trainable_dtype(model)
    callbacks.check_trainable(model, fp16=True)
    assert model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="nothing to train"):
        callbacks.check_trainable(model.requires_grad_(False), fp16=False)


def test_an_unprepared_dtype_stops_the_run_before_its_first_step(tmp_path):
    trainer = build(Trainer, tmp_path, random_llama().to(torch.bfloat16))
    trainer.add_callback(callbacks.CheckBeforeTraining())
    with pytest.raises(ValueError, match="load the model with dtype=torch.float32"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_prefix_tuning_with_checkpointing_is_refused_in_words(tmp_path):
    trainer = build(SFTTrainer, tmp_path, wrapped("prefix"))
    trainer.args.gradient_checkpointing = True
    prepare_trainer(trainer)
    with pytest.raises(ValueError, match="pass gradient_checkpointing=False"):
        trainer.train()


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


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("size", [{"max_steps": 4}, {"num_train_epochs": 1}], ids=str)
def test_a_finished_run_is_loaded_and_not_trained_on(method, size, tmp_path, capsys):
    settings = {"max_steps": -1, "save_strategy": "steps", "save_steps": 2} | size
    settings["per_device_train_batch_size"] = 10
    trainer = build(SFTTrainer, tmp_path, wrapped(method), **settings)
    prepare_trainer(trainer)
    trainer.train()
    again = build(SFTTrainer, tmp_path, wrapped(method), **settings)
    prepare_trainer(again)
    again.train(resume_from_checkpoint=find_checkpoint(tmp_path))
    assert "nothing left to train: checkpoint-4" in capsys.readouterr().out
    assert LossHistory.from_trainer(again) == LossHistory.from_trainer(trainer)
    theirs = dict(trainer.model.named_parameters())
    for name, parameter in again.model.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], atol=0, rtol=0)
    assert not again.model.training
    ids = torch.tensor([[5, 6, 7]])
    assert again.model.generate(input_ids=ids, max_new_tokens=3).shape[1] > 3


@pytest.mark.parametrize("load_best", [False, True])
def test_a_run_that_stopped_early_is_not_trained_on(load_best, tmp_path, capsys):
    """Nothing is enough of a gain for this one; its loss rises from the beginning."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 9}
    settings |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 5}
    settings |= {"metric_for_best_model": "eval_loss", "learning_rate": 0.1}
    settings["load_best_model_at_end"] = load_best
    stop = {"early_stopping_patience": 3, "early_stopping_threshold": 1e6}
    runs = []
    for checkpoint in (None, "last"):
        trainer = build(SFTTrainer, tmp_path, wrapped("lora"), **settings)
        trainer.args.load_best_model_at_end = True  # the callback insists on it
        trainer.add_callback(EarlyStoppingCallback(**stop))
        prepare_trainer(trainer)
        trainer.args.load_best_model_at_end = load_best or checkpoint is None
        checkpoint = checkpoint and find_checkpoint(tmp_path)
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append(trainer)
    first, again = runs
    last, best = first.state.global_step, Path(first.state.best_model_checkpoint).name
    assert again.state.global_step == last < 9 and best != f"checkpoint-{last}"
    assert f"nothing left to train: checkpoint-{last}" in capsys.readouterr().out
    wanted = best if load_best else f"checkpoint-{last}"
    kept = load_file(tmp_path / wanted / "adapter_model.safetensors")
    ours = get_peft_model_state_dict(again.model)
    assert kept.keys() == ours.keys() and len(kept) > 4
    assert all(torch.equal(kept[name], ours[name]) for name in kept)
    patient = build(SFTTrainer, tmp_path, wrapped("lora"), **settings)
    patient.args.load_best_model_at_end = True
    patient.add_callback(EarlyStoppingCallback(**stop | {"early_stopping_patience": 5}))
    prepare_trainer(patient)
    patient.train(resume_from_checkpoint=find_checkpoint(tmp_path))
    assert patient.state.global_step > last  # more patience, more steps


def test_only_complete_checkpoints_are_found(tmp_path):
    assert find_checkpoint(tmp_path / "nothing here") is None
    trainer = build(
        SFTTrainer, tmp_path, wrapped("lora"), save_strategy="steps", save_steps=2
    )
    prepare_trainer(trainer)
    trainer.train()
    newest = tmp_path / "checkpoint-4"
    assert find_checkpoint(tmp_path) == str(newest)
    for name in ("adapter_model.safetensors", "optimizer.pt", callbacks.MANIFEST):
        copy = tmp_path / "copy"
        shutil.copytree(tmp_path, copy, ignore=shutil.ignore_patterns("copy"))
        broken = copy / "checkpoint-4" / name
        broken.write_bytes(broken.read_bytes()[:-1])
        assert find_checkpoint(copy) == str(copy / "checkpoint-2"), name
        broken.unlink()
        assert find_checkpoint(copy) == str(copy / "checkpoint-2"), name
        shutil.rmtree(copy)


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


@pytest.mark.parametrize(
    "own", [{"label_smoothing_factor": 0.1}, {"loss_type": "dft"}, "function", "class"]
)
def test_a_loss_of_the_users_own_is_kept(own, tmp_path):
    class Mine(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **rest):
            return super().compute_loss(model, inputs, return_outputs, **rest)

    settings = own if isinstance(own, dict) else {}
    kind = Trainer if "label_smoothing_factor" in settings else SFTTrainer
    trainer = build(kind, tmp_path, random_llama(), **settings)
    if own == "function":
        trainer.compute_loss_func = lambda outputs, labels, **rest: outputs.logits.sum()
    if own == "class":
        trainer.__class__ = Mine
    prepare_trainer(trainer)
    assert "compute_loss" not in vars(trainer)


def test_progress_comes_about_eight_times_whatever_is_logged(tmp_path, capsys):
    model = random_llama()
    trainer = build(SFTTrainer, tmp_path, model, max_steps=40, logging_steps=3)
    prepare_trainer(trainer)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert 6 <= len(lines) <= 9
