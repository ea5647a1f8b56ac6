"""Lesson 11: gradient noise, steps to a loss, formats bit by bit, 16-bit weights."""

import math

import pytest
import torch
from cells import cells
from hypothesis import given
from hypothesis import strategies as st

LESSON = "11_reading_curves"
NOISE = ("letters", "noise-scale", "steps-to")
NUMBERS = ("bits", "scaler-scratch", "ways")
noise = cells(LESSON, "imports", *NOISE)
numbers = cells(LESSON, "imports", *NUMBERS)
positive = st.floats(1e-3, 1e3)


@given(positive, positive, st.integers(1, 64), st.integers(2, 64))
def test_two_lengths_give_gradient_and_noise(squared, trace, b, times):
    B = b * times
    lengths = squared + trace / b, squared + trace / B
    found = noise.noise_parts(*lengths, b, B)
    assert found == pytest.approx((squared, trace), rel=1e-5, abs=1e-5 * sum(lengths))


def test_the_noise_scale_is_that_of_all_examples(monkeypatch):
    """Few examples, drawn often: the estimate is the ratio that all of them have."""
    x, y = noise.x_all[:256], noise.y_all[:256]
    monkeypatch.setattr(noise, "x_all", x)
    monkeypatch.setattr(noise, "y_all", y)
    model = noise.letter_model(0)
    single = [noise.gradient(model, x[i : i + 1], y[i : i + 1]) for i in range(256)]
    single = torch.stack(single)
    exact = single.var(0, correction=0).sum() / single.mean(0).square().sum()
    found = noise.noise_scale(model, draws=200, b=8, B=128)
    assert found == pytest.approx(exact.item(), rel=0.25)


def test_steps_are_counted_to_the_first_look_below_the_target():
    assert noise.steps_to(10.0, 4, 1e-3, 0, 5) == 1
    assert noise.steps_to(0.0, 4, 1e-3, 0, 5) is None
    rate = {"batch": 64, "rate": 2**-6, "seed": 0}
    few = noise.steps_to(3.2, **rate, limit=200)
    assert few == noise.steps_to(3.2, **rate, limit=200)
    assert few < noise.steps_to(2.9, **rate, limit=400)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_pattern_of_16_bits_is_read_as_torch_reads_it(dtype):
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    x = bits.view(dtype)
    found = numbers.value_of(*numbers.parts_of(x), dtype)
    assert torch.equal(found.isnan(), x.isnan())
    assert torch.equal(found.nan_to_num(7), x.double().nan_to_num(7))
    off = x.double()[x.isfinite()] * 1.01
    assert not torch.equal(found[x.isfinite()], off)


@pytest.mark.parametrize("x", [0.0, -0.0, 1e-45, -1e-38, 3.4e38, math.inf, -math.inf])
def test_ends_of_float32(x):
    x = torch.tensor([x])
    found = numbers.value_of(*numbers.parts_of(x), torch.float32)
    assert found.item() == x.item()
    assert found.signbit().item() == x.signbit().item()


def scaled_run(scaler, broken=(), steps=30):
    """Adam on a parabola; in some steps the gradient is not finite."""
    p = torch.nn.Parameter(torch.linspace(-1, 1, 5))
    optimizer, scales = torch.optim.Adam([p], lr=0.1), []
    for step in range(steps):
        scaler.scale((p * p).sum()).backward()
        if step in broken:
            p.grad[step % 5] = (math.nan, math.inf)[step % 2]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return p.detach(), scales


@pytest.mark.parametrize("broken", [(), (0,), (3, 4, 5), (6, 13, 28, 29)])
@pytest.mark.parametrize("interval", [1, 4, 100])
def test_the_scaler_is_pytorchs_step_for_step(broken, interval):
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=interval)
    weights, scales = scaled_run(theirs, broken)
    ours = scaled_run(numbers.LossScaler(2.0**10, interval), broken)
    assert torch.equal(ours[0], weights) and ours[1] == scales
    if interval < 30:
        other = scaled_run(numbers.LossScaler(2.0**10, interval + 1), broken)
        assert other[1] != scales


def test_stochastic_rounding_takes_both_neighbours_in_the_right_proportion():
    torch.manual_seed(0)
    for x in (0.15, -0.15, 3.3, -1e-20):
        draws = numbers.stochastic(torch.full((100_000,), x)).double()
        low, high = draws.unique().tolist()
        assert low < torch.tensor(x).item() < high
        share = (draws == high).double().mean().item()
        assert share == pytest.approx((x - low) / (high - low), abs=0.01)
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(numbers.stochastic(exact.float()), exact)


def test_stochastic_rounding_is_torchaos(monkeypatch):
    """With the same 16 bits: theirs rounds up below the fraction, ours from the top."""
    theirs = pytest.importorskip("torchao.optim.quant_utils")._fp32_to_bf16_sr
    x = torch.randn(4096) * 10 ** torch.randint(-20, 20, (4096,))
    bits = torch.randint(0, 2**16, x.shape, dtype=torch.int32)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: bits)
    wanted = theirs(x)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: 2**16 - 1 - bits)
    assert torch.equal(numbers.stochastic(x), wanted)


def test_a_kahan_sum_is_optimis_step_for_step():
    optimi = pytest.importorskip("optimi")
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(512).bfloat16())
    kept, start = {"w": p.detach().clone()}, p.detach().clone()
    optimizer = optimi.SGD([p], lr=2**-8, momentum=0, kahan_sum=True)
    for _ in range(50):
        gradient = (0.1 + 0.1 * torch.randn(512)).bfloat16()
        numbers.kahan(kept, -(2**-8) * gradient.float())
        p.grad = gradient
        optimizer.step()
        assert torch.equal(kept["w"], p.detach())
    assert not torch.equal(kept["w"], start)


def test_of_small_moves_plain_rounding_keeps_none_and_the_others_all():
    start, move = torch.full((2000,), 0.15).bfloat16(), torch.full((2000,), 1e-4)
    wanted = start[0].item() + 100 * 1e-4
    found = {}
    torch.manual_seed(0)
    for way in (numbers.plain, numbers.by_chance, numbers.kahan, numbers.master):
        kept = {"w": start.clone()}
        for _ in range(100):
            way(kept, move)
        found[way.__name__] = kept["w"].double().mean().item()
    assert found.pop("plain") == start[0].item()
    assert all(abs(each - wanted) < 6e-4 for each in found.values()), found


def test_the_lesson_runs_without_the_libraries_it_is_compared_with():
    assert not {"optimi", "torchao"} & vars(numbers).keys()
