"""LoRA from scratch: equal to PEFT with random adapters; merging, saving, loading."""

import copy

import pytest
import torch
from cells import cells
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import random_llama
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from course_utils.models import load_model
from course_utils.parameters import count_parameters

lesson = cells("03_lora", "imports", "scratch", "inject")
LoRALinear, inject_lora = lesson.LoRALinear, lesson.inject_lora
TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(3, 15).reshape(2, 6)


def lora_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def take_out(model, *, merge=False):
    """Put plain layers back in place: the old ones, or with A and B merged in."""
    for name, layer in lora_layers(model).items():
        parent, _, last = name.rpartition(".")
        plain = layer.to_linear() if merge else layer.base
        setattr(model.get_submodule(parent), last, plain)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def randomise(model, seed=1):
    """Give every trainable parameter random values, so that B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3, generator=generator)
    return model


def copy_to_peft(ours, theirs, factor=1.0):
    """Give PEFT's layers the matrices of ours, B times a factor."""
    with torch.no_grad():
        for name, layer in lora_layers(ours).items():
            twin = theirs.get_submodule(f"base_model.model.{name}")
            twin.lora_A["default"].weight.copy_(layer.A)
            twin.lora_B["default"].weight.copy_(factor * layer.B)


def pair(factor=1.0, **changes):
    options = {"r": 4, "lora_alpha": 6} | changes
    ours = inject_lora(random_llama(), TARGETS, options["r"], options["lora_alpha"])
    config = LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", **options)
    theirs = get_peft_model(random_llama(), config).eval()
    copy_to_peft(randomise(ours), theirs, factor)
    return ours, theirs


def test_nothing_changes_at_step_0():
    model = random_llama()
    before = logits(model)
    assert torch.equal(logits(inject_lora(model, TARGETS, r=4, alpha=8)), before)


@pytest.mark.parametrize(("r", "alpha"), [(1, 1), (4, 6), (16, 32)])
def test_random_adapters_give_the_logits_of_peft(r, alpha):
    ours, theirs = pair(r=r, lora_alpha=alpha)
    assert (logits(ours) - logits(random_llama())).abs().max() > 0.1
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("changes", [{"factor": 1.01}, {"use_rslora": True}])
def test_one_per_cent_or_another_scaling_is_seen(changes):
    ours, theirs = pair(**changes)
    assert (logits(ours) - logits(theirs)).abs().max() > 1e-2


def test_the_gradients_are_those_of_peft():
    ours, theirs = pair()
    for model in (ours, theirs):
        model(IDS, labels=IDS).loss.backward()
    for name, layer in lora_layers(ours).items():
        twin = theirs.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(layer.A.grad, twin.lora_A["default"].weight.grad)
        torch.testing.assert_close(layer.B.grad, twin.lora_B["default"].weight.grad)
        assert layer.base.weight.grad is None


def test_only_the_adapters_train_and_they_are_as_many_as_in_peft():
    ours, theirs = pair()
    trainable = {n for n, p in ours.named_parameters() if p.requires_grad}
    assert {n.split(".")[-1] for n in trainable} == {"A", "B"}
    assert count_parameters(ours) == count_parameters(theirs)


def test_the_adapter_is_float32_beside_a_bfloat16_layer():
    layer = LoRALinear.from_linear(nn.Linear(8, 8).bfloat16(), r=2, alpha=2)
    assert (layer.A.dtype, layer.B.dtype) == (torch.float32, torch.float32)
    assert layer(torch.ones(1, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.to_linear().weight.dtype == torch.bfloat16


shapes = st.integers(1, 8)


@settings(max_examples=60)
@given(shapes, shapes, st.integers(1, 4), st.floats(0.1, 64), st.integers(0, 99))
def test_a_merged_layer_equals_the_unmerged_one(d_in, d_out, r, alpha, seed):
    torch.manual_seed(seed)
    layer = LoRALinear.from_linear(nn.Linear(d_in, d_out).double(), r, alpha)
    nn.init.normal_(layer.B)
    layer.double()
    weight, x = layer.base.weight.clone(), torch.randn(3, d_in).double()
    merged = layer.to_linear()
    torch.testing.assert_close(merged(x), layer(x))
    torch.testing.assert_close(merged.weight - weight, layer.delta())
    assert torch.linalg.matrix_rank(layer.delta()) <= r
    assert torch.equal(layer.base.weight, weight), "merging changed the base"


def eight_wide(seed=0):
    """A two-layer network of width 8 with random adapters."""
    torch.manual_seed(seed)
    model = nn.Sequential()
    for name in ("first", "second"):
        model.add_module(name, nn.Linear(8, 8))
    return randomise(inject_lora(model, ["first", "second"], r=2, alpha=4), seed)


@settings(max_examples=30)
@given(st.integers(0, 99))
def test_merging_a_model_of_width_8(seed):
    x = torch.randn(5, 8)
    model = eight_wide(seed)
    adapted = model(x)
    plain = copy.deepcopy(model)
    take_out(plain)
    take_out(model, merge=True)
    assert not lora_layers(model) and not lora_layers(plain)
    torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain(x), adapted, rtol=1e-3, atol=1e-3)
    once = model(x)
    take_out(model, merge=True)  # a second time finds nothing to merge
    assert torch.equal(model(x), once)


def test_taking_the_adapters_out_gives_the_old_model_back():
    model = random_llama()
    before, names = logits(model), set(model.state_dict())
    take_out(randomise(inject_lora(model, TARGETS, r=2, alpha=2)))
    assert torch.equal(logits(model), before)
    assert set(model.state_dict()) == names


def test_saving_and_loading_ours(tmp_path):
    ours, _ = pair()
    torch.save(
        {n: p for n, p in ours.state_dict().items() if n.split(".")[-1] in "AB"},
        tmp_path / "adapter.pt",
    )
    fresh = inject_lora(random_llama(), TARGETS, r=4, alpha=6)
    assert not torch.allclose(logits(fresh), logits(ours))
    saved = torch.load(tmp_path / "adapter.pt", weights_only=True)
    assert len(saved) == 2 * len(lora_layers(fresh))
    assert fresh.load_state_dict(saved, strict=False).unexpected_keys == []
    assert torch.equal(logits(fresh), logits(ours))


def test_saving_loading_and_merging_in_peft_what_ours_learned(tmp_path):
    ours, theirs = pair()
    theirs.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(random_llama(), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(ours), rtol=0, atol=1e-4)
    merged = again.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), logits(ours), rtol=0, atol=1e-4)
    take_out(ours, merge=True)
    torch.testing.assert_close(logits(merged), logits(ours), rtol=0, atol=1e-4)


def test_layers_that_are_no_targets_stay():
    model = inject_lora(random_llama(), ["q_proj"], r=2, alpha=2)
    assert {n.split(".")[-1] for n in lora_layers(model)} == {"q_proj"}
    assert len(lora_layers(model)) == 2


# --- targets ---


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (
            ["query"],
            r"no nn.Linear is named \['query'\]; there are \['down_proj', .*q_p",
        ),
        (["q_proj", "value"], r"named \['value'\]"),
        (["layers"], r"named \['layers'\]"),
        (["norm", "embed_tokens"], r"named \['embed_tokens', 'norm'\]"),
        ("q_proj", "no nn.Linear is named"),
        ("all-linear", "no nn.Linear is named"),
        ([], "no nn.Linear is named"),
    ],
    ids=str,
)
def test_targets_that_no_layer_bears_are_an_error_and_change_nothing(targets, words):
    model = random_llama()
    with pytest.raises(ValueError, match=words):
        inject_lora(model, targets, r=4, alpha=8)
    assert not lora_layers(model)
    assert all(p.requires_grad for p in model.parameters())


def test_the_layers_of_gpt2_are_no_linear_layers():
    config = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 259}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **config))
    with pytest.raises(ValueError, match=r"\['c_attn'\]; there are \['lm_head'\]"):
        inject_lora(model, ["c_attn"], r=4, alpha=8)


def test_a_second_time_gives_fresh_adapters_that_train():
    model = inject_lora(random_llama(), TARGETS, r=4, alpha=8)
    before = count_parameters(model)
    again = inject_lora(randomise(model), ["q_proj", *TARGETS], r=4, alpha=8)
    assert count_parameters(again) == before
    assert torch.equal(logits(again), logits(random_llama()))
    assert not any("base.base" in name for name, _ in again.named_modules())


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_a_quantized_model_gets_adapters_of_the_right_shapes(quantization, tmp_path):
    random_llama().save_pretrained(tmp_path)
    options = {"quantization": quantization, "dtype": torch.float32}
    model = load_model(tmp_path, **options)
    before = logits(model)
    inject_lora(model, TARGETS, r=4, alpha=8)
    for name, layer in lora_layers(model).items():
        plain = random_llama().get_submodule(name)
        assert layer.A.shape == (4, plain.in_features)
        assert layer.B.shape == (plain.out_features, 4)
        with pytest.raises(ValueError, match="dequantize the weight"):
            layer.to_linear()
    assert torch.equal(logits(model), before)
    randomise(model)(IDS, labels=IDS).loss.backward()
    assert all(layer.A.grad.any() for layer in lora_layers(model).values())
    config = LoraConfig(target_modules=TARGETS, r=4, lora_alpha=8)
    theirs = get_peft_model(load_model(tmp_path, **options), config).eval()
    copy_to_peft(model, theirs)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-4)
