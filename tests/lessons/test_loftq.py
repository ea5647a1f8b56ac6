"""LoftQ's and QPiSSA's starts, by hand and on bitsandbytes' 4-bit layers."""

import functools

import pytest
import torch
from bitsandbytes import functional as bnb
from cells import cells
from peft import LoraConfig, get_peft_model
from small_models import random_llama

from maintenance.runs.rounding import LoftQ, QPiSSA, round_4bit, set_start

lesson = cells("09_other_adapters", "imports", "loftq")
low_rank, loftq_init = lesson.low_rank, lesson.loftq_init


STARTS = {
    "qpissa": lesson.qpissa_init,
    "loftq": loftq_init,
    "loftq, 5 rounds": functools.partial(loftq_init, rounds=5),
}
RECORDED = {"qpissa": QPiSSA(), "loftq": LoftQ(), "loftq, 5 rounds": LoftQ(5)}


def weight_of(shape=(96, 64)):
    torch.manual_seed(0)
    decay = torch.diag(0.9 ** torch.arange(shape[1]).float())
    return torch.randn(shape) @ decay


@pytest.mark.parametrize("shape", [(96, 64), (64, 128)])
def test_low_rank_is_the_best_of_its_rank(shape):
    matrix = torch.randn(shape)
    A, B = low_rank(matrix, 8, 24)
    assert A.shape == (8, shape[1]) and B.shape == (shape[0], 8)
    left = (matrix - 3 * B @ A).norm()
    best = torch.linalg.svdvals(matrix)[8:].norm()
    assert best * 0.9999 <= left <= best * 1.001
    assert torch.allclose(A.norm(), B.norm(), rtol=1e-4), "each takes the root"


@pytest.mark.parametrize("name", STARTS)
def test_a_start_is_nearer_than_plain_4_bits(name):
    weight = weight_of()
    A, B, rounded = STARTS[name](weight, 8, 16, round_4bit)
    plain = (round_4bit(weight) - weight).norm()
    error = (rounded + 2 * B @ A - weight).norm()
    assert error < 0.9 * plain
    assert torch.allclose(round_4bit(rounded), rounded, atol=1e-5), "in 4 bits already"
    assert (rounded + B @ A - weight).norm() > 1.02 * error, "the scale is alpha / r"


def test_one_round_of_loftq_leaves_the_plain_4_bits():
    weight = weight_of()
    A, B, rounded = loftq_init(weight, 8, 16, round_4bit)
    assert torch.equal(rounded, round_4bit(weight))
    exact = torch.linalg.svdvals(weight - rounded)[8:].norm()
    assert torch.allclose((weight - rounded - 2 * B @ A).norm(), exact, rtol=1e-3)
    more = loftq_init(weight, 8, 16, round_4bit, rounds=5)
    assert (more[2] + 2 * more[1] @ more[0] - weight).norm() < exact


@pytest.mark.parametrize("name", STARTS)
def test_recorded_runs_start_as_the_lesson_does(name):
    parts = {}
    for home, start in (("lesson", STARTS), ("recorded", RECORDED)):
        torch.manual_seed(0)  # the randomised SVD's
        parts[home] = start[name](weight_of((192, 128)), 8, 24, round_4bit)
    for ours, theirs in zip(parts["lesson"], parts["recorded"], strict=True):
        assert torch.equal(ours, theirs)
        assert not torch.equal(1.01 * ours, theirs)


def test_the_lessons_rounding_is_the_recorded_one_up_to_near_ties():
    weight = weight_of((576, 192))
    ours, recorded = lesson.rounding(weight), round_4bit(weight, double_quant=True)
    assert (ours - recorded).norm() < 0.02 * (recorded - weight).norm()
    assert (1.01 * ours - recorded).norm() > 0.05 * (recorded - weight).norm()


@pytest.mark.parametrize("name", STARTS)
def test_a_peft_model_gets_the_start(name, tmp_path, monkeypatch):
    from course_utils.models import load_model

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    plain = random_llama(hidden_size=64, intermediate_size=128)
    plain.save_pretrained(tmp_path)
    base = load_model(str(tmp_path), dtype=torch.float32, quantization="nf4")
    config = LoraConfig(r=4, lora_alpha=12, target_modules="all-linear")
    model = get_peft_model(base, config)
    trained = model.get_nb_trainable_parameters()
    changed = set_start(model, plain.state_dict(), RECORDED[name])
    assert changed == 7 * plain.config.num_hidden_layers
    assert model.get_nb_trainable_parameters() == trained
    for layer_name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            original = plain.get_parameter(f"{layer_name}.weight")
            held = layer.base_layer.weight
            kept = held.quant_state
            rounded = bnb.dequantize_4bit(held.data, kept)
            A, B = (m["default"].weight for m in (layer.lora_A, layer.lora_B))
            error = (rounded + 3 * B @ A - original).norm() / original.norm()
            double = round_4bit(original, double_quant=True)
            assert error < 0.95 * (double - original).norm() / original.norm()
    ids = torch.tensor([[3, 4, 5, 6]])
    model.train()(input_ids=ids, labels=ids).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.abs().sum() > 0 for g in grads)
