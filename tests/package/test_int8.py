"""Frozen matrices in int8: right products, gradients near, exact where it matters."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from peft import (
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from small_models import random_llama
from small_training import BF16, FP32, batch, build
from torch.nn import Linear
from transformers import GPT2Config, GPT2LMHeadModel, Trainer
from trl import SFTTrainer

from course_utils import training_speed
from course_utils.records import load_record
from course_utils.training import LossHistory, prepare_trainer
from course_utils.training_speed import (
    _rounded,
    completion_loss,
    int8_levels,
    int8_products,
)

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build has no such products"
)
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
METHODS = {
    "lora": LoraConfig(**LORA),
    "rslora": LoraConfig(**LORA, use_rslora=True),
    "dora": LoraConfig(**LORA, use_dora=True),
    "pissa": LoraConfig(**LORA, init_lora_weights="pissa"),
    "prompt": PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "prefix": PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}


def wide_llama():
    """A random Llama none of whose matrices is too small for int8."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4}
    return random_llama(initializer_range=0.1, **sizes)


def adapted(method):
    torch.manual_seed(4)
    model = get_peft_model(wide_llama(), METHODS[method])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.train()


def frozen_linear(rows=96, columns=128, bias=True):
    torch.manual_seed(1)
    layer = Linear(columns, rows, bias=bias).requires_grad_(False)
    with torch.no_grad():  # rows and columns of unlike size: no scale is like another
        layer.weight.mul_(torch.rand(rows, 1) * 3).mul_(torch.rand(columns) * 3)
    return layer


def in_8_bits(x, levels, dim):
    """What rounding leaves of x: as many steps each way as `levels`, by its maximum."""
    step = x.abs().amax(dim, keepdim=True) / levels
    return (x / step).round() * step


def off(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_rounded_numbers_stand_for_those_they_came_from():
    x = torch.randn(3, 5, 64) * torch.logspace(-6, 6, 15).view(3, 5, 1)
    x[0, 0] = 0
    values, scale = _rounded(x)
    assert values.dtype == torch.uint8
    assert (values.shape, scale.shape) == ((15, 64), (15, 1))
    back = ((values.float() - 128) * scale).view_as(x)
    assert ((back - x).abs() <= 0.501 * scale.view(3, 5, 1)).all()
    assert not back[0, 0].any()


@pytest.mark.parametrize("levels", [63, 127])
def test_a_product_and_its_gradient_are_those_of_rounded_numbers(levels, monkeypatch):
    if levels > int8_levels():
        pytest.skip("this processor adds such products in 16 bits")
    layer, x = frozen_linear(), torch.randn(4, 7, 128, requires_grad=True)
    gradient = torch.randn(4, 7, 96) * torch.logspace(-3, 3, 28).view(4, 7, 1)
    expected = in_8_bits(x.detach(), 127, -1) @ in_8_bits(layer.weight, levels, 1).T
    expected_back = in_8_bits(gradient, 127, -1) @ in_8_bits(layer.weight, levels, 0)
    exact = layer(x)
    [exact_back] = torch.autograd.grad(exact, x, gradient)
    monkeypatch.setattr(training_speed, "int8_levels", lambda: levels)
    with int8_products(layer):
        y = layer(x)
        [back] = torch.autograd.grad(y, x, gradient)
    torch.testing.assert_close(y, expected + layer.bias, rtol=1e-3, atol=2e-3)
    assert off(back, expected_back) < 1e-4
    assert 1e-4 < off(y, exact) < 0.02
    assert 1e-4 < off(back, exact_back) < 0.02


def test_rows_of_the_greatest_numbers_are_multiplied_right():
    layer, x = frozen_linear(64, 256, bias=False), torch.full((8, 256), 3.0)
    layer.weight.fill_(0.5)
    with int8_products(layer):
        assert off(layer(x), torch.full((8, 64), 384.0)) < 1e-5
        assert off(layer(-x), torch.full((8, 64), -384.0)) < 1e-5


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="names an x86 limit"
)
def test_products_are_right_where_the_processor_adds_in_16_bits():
    tests = [f"{__file__}::{name}" for name in globals() if "multiplied_right" in name]
    tests += [
        f"{__file__}::test_a_product_and_its_gradient_are_those_of_rounded_numbers"
    ]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout
    assert "1 skipped" in child.stdout  # 127 levels


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_of_adapters_are_near_the_exact_ones(method):
    model, data, found = adapted(method), batch(), []

    def step():
        model.zero_grad()
        loss = completion_loss(model, data)
        loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        return loss.detach(), torch.cat(grads)

    exact = step()
    with int8_products(model) as layers:
        rough = step()
        assert len(layers) == 14
        with torch.no_grad():
            found = [model.eval()(**data).logits]
    model.train()
    again = step()
    assert torch.equal(found[0], model.eval()(**data).logits)
    assert torch.equal(again[1], exact[1])  # nothing stays behind
    assert off(rough[0], exact[0]) < 0.02
    assert torch.cosine_similarity(rough[1], exact[1], dim=0) > 0.97
    assert off(rough[1], exact[1]) > 1e-4


def test_what_is_read_by_three_layers_is_rounded_once(monkeypatch):
    calls = []
    monkeypatch.setattr(
        training_speed, "_rounded", lambda x: calls.append(x.shape) or _rounded(x)
    )
    model = adapted("lora")
    with int8_products(model), torch.no_grad():
        model(**batch())
    assert len(calls) == 2 * 4  # a layer: q k v, o, gate and up, down
    layer, x = frozen_linear(), torch.randn(2, 128)
    with int8_products(layer):
        first = layer(x)
        assert off(layer(x.mul_(2)), 2 * first - layer.bias) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_of_autocast_is_of_its_dtype(dtype):
    layer, x = frozen_linear(), torch.randn(2, 5, 128)
    exact = layer(x)
    with int8_products(layer.to(dtype)), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert off(y.float(), exact) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_4_bit_layer_is_multiplied_by_the_weight_that_it_stands_for(dtype):
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    layer = Linear4bit(128, 64, quant_type="nf4", compute_dtype=dtype)
    layer.requires_grad_(False).to("cpu")
    x = torch.randn(3, 128)
    exact = layer(x)
    with int8_products(layer):
        assert 1e-4 < off(layer(x), exact) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_large_bias_stays_out_of_the_rounding(dtype):
    layer, x = frozen_linear(), torch.randn(3, 128)
    exact = layer(x) - layer.bias
    layer.bias.fill_(100.0)
    with int8_products(layer.to(dtype)), torch.no_grad():
        assert off(layer(x) - 100.0, exact) < 0.02
    assert layer.bias[0] == 100


def test_head_and_adapters_are_left_alone():
    model = get_peft_model(
        wide_llama(), LoraConfig(**LORA | {"target_modules": ["lm_head", "q_proj"]})
    )
    model.add_adapter("wide", LoraConfig(**LORA | {"r": 64}))
    with int8_products(model) as layers:
        names = {name for name, module in model.named_modules() if module in layers}
    assert names and not [n for n in names if "lm_head" in n or "lora_" in n]


def test_a_model_without_frozen_linear_layers_is_refused_by_name():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=2, vocab_size=99))
    with (
        pytest.raises(ValueError, match="GPT2LMHeadModel has no frozen Linear layer"),
        int8_products(gpt2.requires_grad_(False)),
    ):
        pass
    with (
        pytest.raises(ValueError, match="LlamaForCausalLM"),
        int8_products(wide_llama()),
    ):
        pass


@pytest.mark.parametrize("kind", [Trainer, SFTTrainer])
@pytest.mark.parametrize("profile", [FP32, BF16], ids=["float32", "bfloat16"])
def test_a_trainer_takes_int8_only_where_it_is_faster(
    kind, profile, tmp_path, monkeypatch, capsys
):
    losses = {}
    for gain, int8 in ((2.0, False), (0.5, True), (2.0, True)):
        monkeypatch.setattr(
            training_speed, "int8_gain", lambda model, gain=gain, **_: gain
        )
        model = adapted("lora")
        trainer = build(kind, tmp_path, model, profile, eval_strategy="epoch")
        prepare_trainer(trainer, int8=int8)
        trainer.train()
        losses[gain, int8] = torch.tensor(LossHistory.from_trainer(trainer).loss)
        layers = [m for m in model.modules() if isinstance(m, Linear)]
        assert not any("forward" in vars(layer) for layer in layers)
        assert set(get_peft_model_state_dict(model)) == set(
            get_peft_model_state_dict(adapted("lora"))
        )
    exact, kept, rough = losses.values()
    assert torch.equal(exact, kept)
    assert 1e-5 < off(rough, exact) < 0.02
    printed = capsys.readouterr().out
    assert "0.5 times as fast as exact, not taken" in printed
    assert "2 times as fast as exact, taken" in printed


def test_a_training_that_fails_leaves_exact_products(tmp_path, monkeypatch):
    monkeypatch.setattr(training_speed, "int8_gain", lambda model, **_: 2.0)
    model = adapted("lora")
    trainer = build(Trainer, tmp_path, model)
    prepare_trainer(trainer, int8=True)
    trainer.training_step = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    assert not any("forward" in vars(layer) for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gain_is_a_ratio_and_leaves_the_model_as_it_was(dtype):
    model = adapted("lora").to(dtype).eval()
    state = torch.get_rng_state()
    assert training_speed.int8_gain(model, bf16=True, tokens=32) > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert not any("forward" in vars(m) for m in model.modules())


def test_the_record_says_what_lesson_7_says_of_it():
    ends = {"exact": {}, "int8": {}}
    for run in load_record("07_int8")["runs"]:
        ends[run["label"]][run["seed"]] = run["eval_loss"][-1][1]
    apart = [ends["int8"][seed] - exact for seed, exact in ends["exact"].items()]
    seeds = max(ends["exact"].values()) - min(ends["exact"].values())
    assert min(apart) > 0 and max(apart) < seeds
