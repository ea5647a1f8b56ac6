"""Progress, checks before step 1, honest checkpoints, finished runs."""

import gc
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from small_models import random_llama
from small_training import build, wrapped
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from trl import SFTTrainer

from course_utils import training_callbacks as callbacks
from course_utils.memory.estimate import _live_tensor_bytes
from course_utils.training import (
    LossHistory,
    find_checkpoint,
    prepare_trainer,
)


def test_trainable_parameters_are_made_float32(tmp_path):
    model = wrapped("lora")
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match="lora_A.*bfloat16.*fix_trainable_dtype"):
        callbacks._check_trainable(model, fp16=True)
    callbacks.fix_trainable_dtype(model)
    callbacks._check_trainable(model, fp16=True)
    assert model.get_base_model().lm_head.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="nothing to train"):
        callbacks._check_trainable(model.requires_grad_(False), fp16=False)


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


def test_progress_comes_about_eight_times_whatever_is_logged(tmp_path, capsys):
    model = random_llama()
    trainer = build(SFTTrainer, tmp_path, model, max_steps=40, logging_steps=3)
    prepare_trainer(trainer)
    trainer.train()
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]
    assert 6 <= len(lines) <= 9


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


class KeepsACopy(TrainerCallback):
    def on_train_begin(self, args, state, control, model=None, **_):
        self.copy = [p.detach().clone() for p in model.parameters()]


class KeepsGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients = [p.grad for p in model.parameters()]


@pytest.mark.parametrize("fault", [None, KeepsACopy, KeepsGradients])
def test_full_training_holds_16_bytes_a_parameter_and_few_more(tmp_path, fault):
    """Between steps weights and AdamW's averages, at the peak gradients, too."""
    gc.collect()
    before = _live_tensor_bytes()
    model = random_llama(hidden_size=256, intermediate_size=1024, vocab_size=4096)
    sizes = {"max_steps": 3, "per_device_train_batch_size": 1}
    trainer = build(SFTTrainer, tmp_path, model, **sizes)
    prepare_trainer(trainer)
    peak = callbacks.PeakOfStep()
    for callback in (peak, fault and fault()):
        if callback:
            trainer.add_callback(callback)
    trainer.train()
    parameters = sum(p.numel() for p in model.parameters())
    start = (peak._used.start_bytes - before) / parameters
    most = (peak.peak_bytes - before) / parameters
    assert (start <= 12.5 and most <= 17) == (fault is None), (start, most)
