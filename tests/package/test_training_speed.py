"""The same losses and gradients with less work; batches by seed and epoch."""

import random

import pytest
import torch
from small_models import random_llama
from small_training import BF16, batch, begun, build, wrapped
from transformers import Trainer
from trl import SFTTrainer

from course_utils.training import (
    LossHistory,
    SeededBatches,
    prepare_trainer,
)
from course_utils.training_speed import (
    completion_loss,
    shared_beginning,
    without_padding,
)


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


@pytest.mark.parametrize("method", ["prompt", "p-tuning", "prefix"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("beginning", [0, 12])
def test_behind_virtual_tokens_packed_examples_are_read_as_alone(
    method, attention, beginning
):
    model, data = wrapped(method).train(), batch(9, beginning)
    model.get_base_model().set_attn_implementation(attention)
    own = model(**data).loss
    own.backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    packed = without_padding(model, data)
    assert packed["input_ids"].numel() < 0.8 * data["input_ids"].numel()
    model.zero_grad()
    loss = completion_loss(model, packed)
    loss.backward()
    assert loss.item() == pytest.approx(own.item(), abs=1e-6)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    for theirs, ours in zip(expected, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
    positions = torch.arange(packed["input_ids"].shape[1]).expand_as(packed["labels"])
    seen = torch.zeros_like(packed["attention_mask"])
    causal = seen.masked_fill(positions[:1] > positions[:1].T, -torch.inf)
    for wrong in ({"position_ids": positions}, {"attention_mask": causal}):
        assert abs(completion_loss(model, packed | wrong).item() - own.item()) > 1e-5


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "olmo2"])
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


def test_positions_of_a_padded_batch_hide_no_virtual_tokens():
    model, data = wrapped("prefix").train(), batch()
    loss = completion_loss(model, data)
    positions = torch.arange(data["input_ids"].shape[1]).expand_as(data["input_ids"])
    assert completion_loss(model, data | {"position_ids": positions}).item() == loss


def test_batches_that_cannot_be_packed_stay_padded():
    data = batch(9)
    model = wrapped("prompt")
    model.get_base_model().gradient_checkpointing_enable()  # it keeps no cache
    assert without_padding(model, data) is data
    model = wrapped("prefix")
    model.config.sliding_window = 8  # whose mask ours would replace
    assert without_padding(model, data) is data
    model = random_llama()
    more = data | {"token_type_ids": torch.zeros_like(data["labels"])}
    assert without_padding(model, more) is more
    alike = {name: values[:1].repeat(3, 1) for name, values in data.items()}
    width = int(alike["attention_mask"][0].sum())
    alike = {name: values[:, :width] for name, values in alike.items()}
    assert without_padding(model, alike)["input_ids"].numel() == 3 * width
    few = without_padding(model, batch(9, beginning=7))
    assert "position_ids" in few and "attention_mask" not in few
    for setting in ("attention_dropout", "output_router_logits"):
        setattr(model.config, setting, 0.1)
        assert without_padding(model, data) is data
        setattr(model.config, setting, 0.0)
    assert without_padding(model, data) is not data


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
@pytest.mark.parametrize("method", ["full", "lora", "prompt", "prefix"])
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
