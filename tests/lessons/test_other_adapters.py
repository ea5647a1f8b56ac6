"""What lesson 9 builds, run from its cells on small random models."""

import copy

import peft
import pytest
import torch
from cells import cells
from hypothesis import given
from hypothesis import strategies as st
from peft import get_peft_model
from small_models import random_llama

lesson = cells(
    "09_other_adapters",
    *("imports", "bottleneck-scratch", "six-scratch", "six-parity", "six-random"),
    definitions=True,
)
IDS = torch.tensor([[5, 9, 33, 120, 7]])
ON = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
FOUR_OF_LOHA = "hada_w1_a hada_w1_b hada_w2_a hada_w2_b"
SETTINGS = {
    "IA3": (
        lesson.ia3,
        peft.IA3Config(feedforward_modules=["down_proj"], **ON),
        "ia3_l",
    ),
    "LoHa": (
        lesson.loha,
        peft.LoHaConfig(r=3, alpha=5, **ON),
        f"scaling {FOUR_OF_LOHA}",
    ),
    "LoKr": (
        lesson.lokr,
        peft.LoKrConfig(r=1, alpha=3, **ON),
        "scaling lokr_w1 lokr_w2_a lokr_w2_b",
    ),
    "VeRA": (
        lesson.vera,
        peft.VeraConfig(r=7, projection_prng_key=3, **ON),
        "vera_A vera_B vera_lambda_d vera_lambda_b",
    ),
    "OFT": (lesson.oft, peft.OFTConfig(oft_block_size=8, **ON), "oft_R"),
    "LN tuning": (
        lesson.norm_scale,
        peft.LNTuningConfig(task_type="CAUSAL_LM"),
        "ln_tuning_layers",
    ),
}


class Profile:
    seed = 3


@pytest.fixture(autouse=True)
def small():
    lesson.cut, lesson.profile = random_llama(initializer_range=0.2), Profile
    return lesson.cut


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore")
def test_each_method_rewrites_the_weights_as_peft_merges_them(name, small):
    rule, config, names = SETTINGS[name]
    fresh = get_peft_model(copy.deepcopy(small), config)
    for key, weight in lesson.rewritten(fresh, rule, names).state_dict().items():
        torch.testing.assert_close(weight, small.state_dict()[key])
    wrapped = lesson.randomised(config)
    theirs = logits(wrapped)
    change = (theirs - logits(small)).norm()
    assert change > 0.01
    off = {}
    for factor in (1, 1.01):
        ours = lesson.rewritten(wrapped, rule, names, factor)
        off[factor] = (logits(ours) - theirs).norm() / change
    assert off[1] < 1e-4 < 2e-3 < off[1.01]
    ours = lesson.rewritten(wrapped, rule, names).state_dict()
    for key, weight in wrapped.merge_and_unload().state_dict().items():
        torch.testing.assert_close(ours[key], weight, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 99), st.sampled_from([2, 4, 8]))
def test_a_small_turn_keeps_lengths_and_its_blocks(seed, size):
    torch.manual_seed(seed)
    W, upper = (
        torch.randn(5, 16),
        0.01 * torch.randn(16 // size, size * (size - 1) // 2),
    )
    turned = lesson.oft(W, upper)
    torch.testing.assert_close(turned.norm(dim=1), W.norm(dim=1), rtol=1e-3, atol=0)
    blocks = [w.reshape(5, -1, size).norm(dim=2) for w in (turned, W)]
    torch.testing.assert_close(*blocks, rtol=1e-3, atol=1e-4)
    assert not torch.equal(turned, W)


@given(st.integers(1, 3), st.integers(1, 3))
def test_ranks_multiply_in_both_products(r, s):
    torch.manual_seed(r + 10 * s)
    zero = torch.zeros(24, 24)
    pairs = (
        torch.randn(24, r),
        torch.randn(r, 24),
        torch.randn(24, s),
        torch.randn(s, 24),
    )
    assert torch.linalg.matrix_rank(lesson.loha(zero, 1.0, *pairs)) == r * s
    C = torch.randn(4, r) @ torch.randn(r, 4)
    product = lesson.lokr(zero, 1.0, C, torch.randn(6, s), torch.randn(s, 6))
    assert torch.linalg.matrix_rank(product) == r * s


def test_a_fresh_bottleneck_is_the_identity_and_alone_is_trained(small):
    before = logits(small)
    model = lesson.insert(copy.deepcopy(small), reduction=8)
    assert torch.equal(logits(model), before)
    model(IDS, labels=IDS).loss.backward()
    d, m, L = 32, 4, 2
    trained = {n: p for n, p in model.named_parameters() if p.grad is not None}
    assert sum(p.numel() for p in trained.values()) == 2 * L * (2 * d * m + m + d)
    assert all(".1.down." in name or ".1.up." in name for name in trained)


def test_a_bottleneck_is_what_its_formula_says_behind_both_halves(small):
    model = lesson.insert(copy.deepcopy(small), reduction=8)
    torch.manual_seed(1)
    seen = {}
    with torch.no_grad():
        for name, part in model.named_modules():
            if isinstance(part, lesson.Bottleneck):
                for p in part.parameters():
                    p.normal_(std=0.3)
                part.register_forward_hook(
                    lambda _, given, out, name=name: seen.update({name: (*given, out)})
                )
        model(IDS)
    places = [f"{half}.1" for half in ("self_attn.o_proj", "mlp.down_proj")]
    assert [*seen] == [
        f"model.layers.{i}.{place}" for i in range(2) for place in places
    ]
    for name, (h, out) in seen.items():
        part = model.get_submodule(name)
        inner = h @ part.down.weight.T + part.down.bias
        inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
        torch.testing.assert_close(out, h + inner @ part.up.weight.T + part.up.bias)
        assert not torch.allclose(out, h + 1.01 * (out - h), rtol=1e-4)
