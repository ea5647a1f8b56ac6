"""NF4 from scratch against bitsandbytes, and what must hold for any weight."""

import math

import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given
from hypothesis import strategies as st

from course_utils import nf4

KINDS = ("nf4", "fp4")
SHAPES = [(576, 192), (64, 128), (192,), (3, 5, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight_of(shape, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return (0.05 * torch.randn(shape)).to(dtype)


def book(levels):
    """Rising, from -1 to 1, with a zero."""
    assert (levels.diff() > 0).all() and levels[-1] == 1 and 0 in levels
    return levels


# --- code books ------------------------------------------------------------------


def test_the_code_books_are_those_of_bitsandbytes():
    theirs = bnb.get_4bit_type("nf4", device="cpu")
    ours = book(nf4.nf4_levels())
    assert len(ours) == 16 and ours[0] == -1
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    assert not torch.allclose(1.01 * ours, theirs, rtol=0, atol=1e-6)
    floats = bnb.get_4bit_type("fp4", device="cpu").unique()  # -0 equals 0
    assert torch.equal(book(nf4.fp4_levels()), floats)
    assert torch.equal(book(nf4.int_levels(4)) * 7, torch.arange(-7.0, 8))
    dynamic = book(nf4.dynamic_levels())
    assert torch.equal(dynamic, bnb.create_dynamic_map()) and len(dynamic) == 256


def test_nf4_holds_equal_shares_of_a_normal_distribution():
    """Between two neighbouring quantiles lies the same share: 1/30 or 1/32, doubled."""
    edge = torch.special.ndtri(torch.tensor(1 - (1 / 32 + 1 / 30) / 2))
    shares = torch.special.ndtr(nf4.nf4_levels() * edge).diff()
    assert torch.allclose(shares[:7], shares[:7].mean(), rtol=1e-4)
    assert torch.allclose(shares[7:], shares[7:].mean(), rtol=1e-4)
    assert shares[0] > 1.1 * shares[-1], "seven negative levels, eight positive"


def test_int8_has_127_steps_each_way():
    levels = nf4.int_levels()
    assert len(levels) == 255 and math.isclose(levels[128], 1 / 127, rel_tol=1e-6)


# --- parity ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_4_bits_are_those_of_bitsandbytes(kind, shape, dtype):
    weight = weight_of(shape, dtype)
    packed, state = bnb.quantize_4bit(weight, quant_type=kind)
    theirs = bnb.dequantize_4bit(packed, state).float()
    four_bit = nf4.quantize_4bit(weight, kind)
    assert torch.equal(four_bit.absmax, state.absmax)
    # A code may differ where a number lies midway between two levels to 7 digits.
    if kind == "nf4":
        same = (four_bit.packed == packed.flatten()).float().mean()
        assert same >= 0.9999
    ours = four_bit.dequantize()
    assert ours.shape == weight.shape and ours.dtype == torch.float32
    ours = ours.to(dtype).float()
    scale = weight.float().abs().max()
    tolerance = max(1e-6, torch.finfo(dtype).eps) * scale
    assert ((ours - theirs).abs() <= tolerance).float().mean() >= 0.9999
    assert not torch.allclose(1.01 * ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_bitsandbytes_are_read_alike(kind):
    """Their bytes through our arithmetic, with double quantization too."""
    weight = weight_of((576, 192))
    for double in (False, True):
        packed, state = bnb.quantize_4bit(
            weight, quant_type=kind, compress_statistics=double
        )
        absmax = state.absmax
        if double:
            mean, second = state.offset, state.state2.absmax
            absmax = nf4.dequantize_absmax(absmax, second, mean)
        codes = nf4.unpack(packed.flatten()).reshape(-1, 64)
        levels = bnb.get_4bit_type(kind, device="cpu")  # in the order of their codes
        ours = nf4.dequantize_blocks(codes, absmax, levels).reshape(weight.shape)
        theirs = bnb.dequantize_4bit(packed, state)
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-7)
        assert not torch.allclose(1.01 * ours, theirs, rtol=0, atol=1e-7)


def test_double_quantization_is_that_of_bitsandbytes():
    """Scales a level apart are near ties, of which ours takes the nearer level."""
    _, absmax = nf4.quantize_blocks(weight_of((1024, 576)), nf4.nf4_levels())
    codes, second, mean = nf4.quantize_absmax(absmax)
    theirs, state = bnb.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    assert torch.equal(second, state.absmax) and mean == absmax.mean()
    other = codes != theirs
    assert other.float().mean() < 0.005
    assert (codes.int() - theirs.int()).abs().max() <= 1
    ours = nf4.dequantize_absmax(codes, second, mean)
    read = nf4.dequantize_absmax(theirs, second, mean)
    assert torch.equal(read, bnb.dequantize_blockwise(theirs, state) + absmax.mean())
    nearer = (ours - absmax).abs() <= (read - absmax).abs() + 1e-8
    assert nearer.all()
    shifted = nf4.dequantize_absmax((codes.int() + 1).clamp(max=255), second, mean)
    assert (shifted - absmax).abs().mean() > 2 * (ours - absmax).abs().mean()


def test_errors_rank_as_the_paper_says():
    weight = weight_of((512, 512))
    error = {}
    for kind in nf4.LEVELS:
        rounded = nf4.quantize_4bit(weight, kind).dequantize()
        error[kind] = ((rounded - weight).norm() / weight.norm()).item()
    assert error["nf4"] < error["int4"] < error["fp4"]
    assert math.isclose(error["nf4"], 0.092, abs_tol=0.001)
    double = nf4.quantize_4bit(weight, double_quant=True).dequantize()
    assert (double - weight).norm() / weight.norm() < error["nf4"] + 0.001


# --- bytes -----------------------------------------------------------------------


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("double", [False, True])
def test_bits_per_parameter_are_those_of_the_tensors(block, double):
    weight = weight_of((1024, 1024))
    four_bit = nf4.quantize_4bit(weight, block=block, double_quant=double)
    assert four_bit.bits_per_parameter == nf4.bits_per_parameter(block, double)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=block, quant_type="nf4", compress_statistics=double
    )
    kept = packed.nbytes + state.absmax.nbytes
    kept += state.state2.absmax.nbytes if double else 0
    assert 8 * kept / weight.numel() == four_bit.bits_per_parameter


def test_the_arithmetic_of_the_paper():
    assert nf4.bits_per_parameter() == 4.5
    assert math.isclose(nf4.bits_per_parameter(double_quant=True), 4.127, abs_tol=5e-4)
    assert nf4.bits_per_parameter(576, bits=8) == 8 + 32 / 576


# --- any weight ------------------------------------------------------------------

floats = st.floats(-100, 100, width=32)


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)), min_size=1))
def test_packing_loses_no_code(pairs):
    codes = [code for pair in pairs for code in pair]
    codes = torch.tensor(codes, dtype=torch.uint8)
    packed = nf4.pack(codes)
    assert packed.dtype == torch.uint8 and len(packed) == len(codes) // 2
    assert torch.equal(nf4.unpack(packed), codes)


@given(st.lists(floats, min_size=32, max_size=32), st.sampled_from(list(nf4.LEVELS)))
def test_no_number_is_off_by_more_than_half_a_gap(values, kind):
    weight = torch.tensor(values)
    rounded = nf4.quantize_4bit(weight, kind, block=32).dequantize()
    half = nf4.LEVELS[kind]().diff().max() / 2
    assert ((rounded - weight).abs() <= half * weight.abs().max() * (1 + 1e-5)).all()
    assert (rounded[weight == 0] == 0).all(), "a zero stays a zero"
    largest = weight.abs().argmax()
    assert math.isclose(rounded[largest].abs(), weight[largest].abs(), rel_tol=1e-6)


@given(st.lists(floats, min_size=64, max_size=64), st.sampled_from(list(nf4.LEVELS)))
def test_a_second_trip_changes_nothing(values, kind):
    once = nf4.quantize_4bit(torch.tensor(values), kind, block=32).dequantize()
    again = nf4.quantize_4bit(once, kind, block=32).dequantize()
    assert torch.allclose(again, once, rtol=1e-6, atol=0)


def test_blocks_do_not_disturb_each_other():
    weight = weight_of((4, 64))
    spoiled = weight.clone()
    spoiled[2, 5] = 100.0
    clean, other = (nf4.quantize_4bit(w).dequantize() for w in (weight, spoiled))
    rows = [0, 1, 3]
    assert torch.equal(clean[rows], other[rows])
    assert not torch.equal(clean[2], other[2])


def test_a_weight_of_zeros_stays_one():
    for double in (False, True):
        four_bit = nf4.quantize_4bit(torch.zeros(512, 64), double_quant=double)
        assert torch.equal(four_bit.dequantize(), torch.zeros(512, 64))


# --- bad requests ----------------------------------------------------------------

GOOD = torch.ones(2, 64)


@pytest.mark.parametrize(
    ("weight", "more", "kind", "message"),
    [
        (torch.ones(64, dtype=torch.int32), {}, TypeError, "not torch.int32"),
        ([1.0] * 64, {}, TypeError, "not list"),
        (GOOD, {"kind": "nf3"}, ValueError, "'nf3' is none of nf4, fp4, int4"),
        (GOOD, {"block": 48}, ValueError, "48 is none of 32, 64"),
        (GOOD, {"block": 64.0}, ValueError, "64.0 is none of"),
        (torch.ones(3, 33), {}, ValueError, r"shape \(3, 33\) has 99 elements"),
        (torch.ones(0), {}, ValueError, "has 0 elements"),
        (GOOD * float("nan"), {}, ValueError, "NaN or infinity"),
        (GOOD * float("inf"), {}, ValueError, "NaN or infinity"),
    ],
)
def test_bad_requests_say_what_is_wrong(weight, more, kind, message):
    with pytest.raises(kind, match=message):
        nf4.quantize_4bit(weight, **more)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_4_bits_are_those_of_bitsandbytes_on_a_card(kind, dtype):
    """A card's kernel finds a level by comparisons of its own."""
    weight = weight_of((576, 192), dtype)
    packed, state = bnb.quantize_4bit(weight.cuda(), quant_type=kind)
    theirs = bnb.dequantize_4bit(packed, state).cpu().float()
    four_bit = nf4.quantize_4bit(weight, kind)
    assert torch.equal(four_bit.absmax, state.absmax.cpu())
    ours = four_bit.dequantize().to(dtype).float()
    scale = weight.float().abs().max()
    tolerance = max(1e-6, torch.finfo(dtype).eps) * scale
    assert ((ours - theirs).abs() <= tolerance).float().mean() >= 0.999
    assert not torch.allclose(1.01 * ours, theirs, atol=tolerance, rtol=0)
    if kind == "nf4":
        same = four_bit.packed == packed.cpu().flatten()
        assert same.float().mean() >= 0.999


@pytest.mark.gpu
def test_double_quantization_on_a_card_is_read_alike():
    weight = weight_of((576, 192))
    packed, state = bnb.quantize_4bit(
        weight.cuda(), quant_type="nf4", compress_statistics=True
    )
    absmax = nf4.dequantize_absmax(
        state.absmax.cpu(), state.state2.absmax.cpu(), state.offset.cpu()
    )
    codes = nf4.unpack(packed.cpu().flatten()).reshape(-1, 64)
    levels = bnb.get_4bit_type("nf4", device="cpu")
    ours = nf4.dequantize_blocks(codes, absmax, levels).reshape(weight.shape)
    theirs = bnb.dequantize_4bit(packed, state).cpu()
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)
    assert not torch.allclose(1.01 * ours, theirs, rtol=0, atol=1e-6)
