"""AdaLoRA under the course's trainer: ranks leave, and losses are the model's."""

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from small_models import random_llama
from small_training import build
from transformers import Trainer
from trl import SFTTrainer

from course_utils.training import LossHistory, prepare_trainer


def adalora(**more):
    settings = {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 1, "total_step": 4}
    settings |= {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    model = random_llama(initializer_range=0.05)
    torch.manual_seed(4)
    return get_peft_model(model, AdaLoraConfig(**settings | more))


def ranks(model):
    return sum(int(m.lora_E["default"].ne(0).sum()) for m in layers(model))


def layers(model):
    return [m for m in model.modules() if hasattr(m, "lora_E")]


def gradients(kind, folder, accumulation, fast):
    """The gradient of each A at step 1, where E is 0: of the penalty and no more."""
    model, seen = adalora(), {}
    batch, more = 4 // accumulation, {"max_grad_norm": 0.0, "max_steps": 4}
    more |= {"per_device_train_batch_size": batch}
    more |= {"gradient_accumulation_steps": accumulation}
    trainer = build(kind, folder, model, **more)
    prepare_trainer(trainer, fast=fast)
    step = trainer.create_optimizer().step

    def keep(*args, **options):
        for name, p in model.named_parameters():
            if "lora_A" in name:
                seen.setdefault(name, p.grad.clone())
        return step(*args, **options)

    trainer.optimizer.step = keep
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return seen, before, LossHistory.from_trainer(trainer).loss


@pytest.mark.parametrize("kind", [Trainer, SFTTrainer])
def test_ranks_leave_by_the_schedule_of_this_run(kind, tmp_path, capsys):
    model = adalora(total_step=100)
    trainer = build(kind, tmp_path, model, max_steps=6)
    prepare_trainer(trainer)
    trainer.train()
    assert ranks(model) == 2 * len(layers(model)) < 6 * len(layers(model))
    assert "total_step is 6" in capsys.readouterr().out
    kept = model.peft_config["default"].rank_pattern
    assert sum(map(sum, kept.values())) == ranks(model)


def test_without_the_courses_callback_nothing_is_taken_away(tmp_path):
    model = adalora()
    build(SFTTrainer, tmp_path, model).train()
    assert ranks(model) == 6 * len(layers(model))
    assert model.peft_config["default"].rank_pattern is None


@pytest.mark.parametrize("kind", [Trainer, SFTTrainer])
@pytest.mark.parametrize("fast", [True, False])
def test_the_penalty_is_in_the_gradient_once_and_in_no_loss(kind, fast, tmp_path):
    runs = [gradients(kind, tmp_path, n, fast) for n in (1, 4)]
    base = random_llama(initializer_range=0.05)
    trainer = build(kind, tmp_path, base)
    prepare_trainer(trainer, fast=fast)
    plain = trainer.evaluate()["eval_loss"]
    trainer.train()
    first = LossHistory.from_trainer(trainer).loss[0]
    model = adalora()
    ids = torch.tensor([[3, 4, 5, 6]])
    model(input_ids=ids, labels=ids).loss.backward()  # PEFT's own: E is 0, too
    own = {n: p.grad for n, p in model.named_parameters() if "lora_A" in n}
    for seen, before, losses in runs:
        assert before == pytest.approx(plain, abs=1e-5)
        assert losses[0] == pytest.approx(first, abs=1e-4)
        assert seen.keys() == own.keys()
        for name, gradient in seen.items():
            torch.testing.assert_close(gradient, own[name])
            assert not torch.allclose(1.01 * gradient, own[name])


@pytest.mark.parametrize(
    "wrong", [{"tinit": 3}, {"target_r": 6}, {"target_r": 8}, {"tfinal": 3}], ids=str
)
def test_a_schedule_that_takes_nothing_away_is_refused(wrong, tmp_path):
    trainer = build(SFTTrainer, tmp_path, adalora(total_step=50, **wrong))
    prepare_trainer(trainer)
    with pytest.raises(ValueError, match="takes no rank away unless .* < 4, the"):
        trainer.train()
    assert trainer.state.global_step == 0
