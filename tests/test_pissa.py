"""PiSSA from scratch against PEFT's, and its conversion to plain LoRA."""

import copy

import pytest
import torch
from cells import cells
from peft import LoraConfig, PeftModel, get_peft_model
from small_models import random_llama

lesson = cells("04_pissa", "imports", "scratch", "convert-by-hand")
pissa_init, pissa_to_lora = lesson.pissa_init, lesson.pissa_to_lora
NAMES = ("q_proj", "v_proj", "up_proj", "down_proj")
IDS = torch.arange(3, 40)[None]


def with_pissa(init="pissa", r=4, alpha=6, dtype=torch.float32):
    """A small model with PEFT's PiSSA on it, and a copy of it from before."""
    base = random_llama().to(dtype)
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        target_modules=list(NAMES),
        init_lora_weights=init,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(copy.deepcopy(base), config), base


def layers(peft_model, base):
    """Yield PEFT's layer and the plain one of the same name."""
    plain = dict(base.named_modules())
    for name, module in peft_model.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            yield module, plain[name]


def disturb(model, seed=1):
    """Move every trainable parameter, as training does."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_the_split_is_pefts():
    model, base = with_pissa()
    found = list(layers(model, base))
    assert len(found) == 2 * len(NAMES)
    for theirs, plain in found:
        A, B, residual = pissa_init(plain.weight.detach(), 4, 6)
        product = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
        assert torch.allclose(B @ A, product, atol=1e-5)
        assert torch.allclose(residual, theirs.base_layer.weight, atol=1e-5)
        assert not torch.allclose(1.01 * B @ A, product, atol=1e-5)
        assert not torch.allclose(1.01 * residual, theirs.base_layer.weight, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
@pytest.mark.parametrize("alpha", [3, 1, 16])
def test_the_parts_add_up_and_the_principal_part_is_the_best(shape, alpha):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    A, B, residual = pissa_init(weight, 3, alpha)
    assert A.shape == (3, shape[1]) and B.shape == (shape[0], 3)
    part = alpha / 3 * B @ A
    assert torch.allclose(part + residual, weight, atol=1e-5)
    left = torch.linalg.svdvals(weight)[3:]
    assert torch.allclose(residual.norm(), left.norm(), atol=1e-5)
    assert torch.allclose(torch.linalg.svdvals(residual)[:3], left, atol=1e-4)


def test_a_weight_in_16_bits_keeps_its_dtype():
    weight = torch.randn(8, 8, dtype=torch.bfloat16)
    A, B, residual = pissa_init(weight, 2, 2)
    assert A.dtype == B.dtype == torch.float32
    assert residual.dtype == torch.bfloat16
    error = (B @ A + residual.float() - weight.float()).abs()
    assert error.max() <= 2**-8 * residual.float().abs().max()


def test_nothing_changes_at_step_0():
    model, base = with_pissa()
    assert torch.allclose(logits(model), logits(base), atol=1e-3)
    disturb(model)
    assert not torch.allclose(logits(model), logits(base), atol=1e-1)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_conversion_equals_on_the_original_base(tmp_path, init):
    model, base = with_pissa(init)
    model.save_pretrained(tmp_path / "start")
    before = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    disturb(model)
    trained = logits(model)
    model.save_pretrained(
        tmp_path / "lora", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    after = dict(model.named_parameters())
    converted = PeftModel.from_pretrained(base, tmp_path / "lora")
    assert converted.peft_config["default"].r == 8
    assert torch.allclose(logits(converted), trained, atol=1e-3)
    theirs = dict(converted.named_parameters())
    for name in (n for n in before if "lora_A" in n):
        twin = name.replace("lora_A", "lora_B")
        A, B = pissa_to_lora(after[name], after[twin], before[name], before[twin])
        assert torch.allclose(B @ A, theirs[twin] @ theirs[name], atol=1e-5)
        assert not torch.allclose(1.01 * B @ A, theirs[twin] @ theirs[name], atol=1e-5)
