"""NF4 from scratch against bitsandbytes, and what must hold for any weight."""

import math

import pytest
import torch
from bitsandbytes import functional as bnb
from cells import cells
from hypothesis import given
from hypothesis import strategies as st

from maintenance.runs.rounding import levels_of, round_4bit, round_blocks

nf4 = cells(
    *("07_qlora", "imports", "int-levels", "blocks", "blocks-back", "nf4", "fp4"),
    *("pack", "unpack", "dynamic", "double", "double-back"),
)
LEVELS = {
    "nf4": nf4.nf4_levels,
    "fp4": nf4.fp4_levels,
    "int4": lambda: nf4.int_levels(4),
}
KINDS = ("nf4", "fp4")
SHAPES = [(576, 192), (64, 128), (192,), (3, 5, 64)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weight_of(shape, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return (0.05 * torch.randn(shape)).to(dtype)


def rounded(weight, kind="nf4", *, block=64, double_quant=False):
    """The weight after its trip through the lesson's 4 bits."""
    levels = LEVELS[kind]()
    codes, absmax = nf4.quantize_blocks(weight, levels, block)
    if double_quant:
        absmax = nf4.dequantize_absmax(*nf4.quantize_absmax(absmax))
    codes = nf4.unpack(nf4.pack(codes)).reshape(codes.shape)
    return nf4.dequantize_blocks(codes, absmax, levels).reshape(weight.shape)


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
    codes, absmax = nf4.quantize_blocks(weight, LEVELS[kind]())
    assert torch.equal(absmax, state.absmax)
    # A code may differ where a number lies midway between two levels to 7 digits.
    if kind == "nf4":
        same = (nf4.pack(codes) == packed.flatten()).float().mean()
        assert same >= 0.9999
    ours = rounded(weight, kind)
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
    for kind in LEVELS:
        gap = rounded(weight, kind) - weight
        error[kind] = (gap.norm() / weight.norm()).item()
    assert error["nf4"] < error["int4"] < error["fp4"]
    assert math.isclose(error["nf4"], 0.092, abs_tol=0.001)
    double = rounded(weight, double_quant=True)
    assert (double - weight).norm() / weight.norm() < error["nf4"] + 0.001


# --- bytes -----------------------------------------------------------------------


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("double", [False, True])
def test_bits_per_parameter_are_those_of_the_tensors(block, double):
    weight = weight_of((1024, 1024))
    codes, absmax = nf4.quantize_blocks(weight, nf4.nf4_levels(), block)
    ours = [nf4.pack(codes), absmax]
    if double:
        ours[1:] = nf4.quantize_absmax(absmax)[:2]
    bits = 8 * sum(tensor.nbytes for tensor in ours) / weight.numel()
    assert bits == 4 + (8 + 32 / 256 if double else 32) / block
    packed, state = bnb.quantize_4bit(
        weight, blocksize=block, quant_type="nf4", compress_statistics=double
    )
    kept = packed.nbytes + state.absmax.nbytes
    kept += state.state2.absmax.nbytes if double else 0
    assert 8 * kept / weight.numel() == bits


# --- any weight ------------------------------------------------------------------

floats = st.floats(-100, 100, width=32)


@given(st.lists(st.tuples(st.integers(0, 15), st.integers(0, 15)), min_size=1))
def test_packing_loses_no_code(pairs):
    codes = [code for pair in pairs for code in pair]
    codes = torch.tensor(codes, dtype=torch.uint8)
    packed = nf4.pack(codes)
    assert packed.dtype == torch.uint8 and len(packed) == len(codes) // 2
    assert torch.equal(nf4.unpack(packed), codes)


@given(st.lists(floats, min_size=32, max_size=32), st.sampled_from(list(LEVELS)))
def test_no_number_is_off_by_more_than_half_a_gap(values, kind):
    weight = torch.tensor(values)
    ours = rounded(weight, kind, block=32)
    half = LEVELS[kind]().diff().max() / 2
    assert ((ours - weight).abs() <= half * weight.abs().max() * (1 + 1e-5)).all()
    assert (ours[weight == 0] == 0).all(), "a zero stays a zero"
    largest = weight.abs().argmax()
    assert math.isclose(ours[largest].abs(), weight[largest].abs(), rel_tol=1e-6)


@given(st.lists(floats, min_size=64, max_size=64), st.sampled_from(list(LEVELS)))
def test_a_second_trip_changes_nothing(values, kind):
    once = rounded(torch.tensor(values), kind, block=32)
    again = rounded(once, kind, block=32)
    assert torch.allclose(again, once, rtol=1e-6, atol=0)


def test_blocks_do_not_disturb_each_other():
    weight = weight_of((4, 64))
    spoiled = weight.clone()
    spoiled[2, 5] = 100.0
    clean, other = rounded(weight), rounded(spoiled)
    rows = [0, 1, 3]
    assert torch.equal(clean[rows], other[rows])
    assert not torch.equal(clean[2], other[2])


def test_a_weight_of_zeros_stays_one():
    for double in (False, True):
        ours = rounded(torch.zeros(512, 64), double_quant=double)
        assert torch.equal(ours, torch.zeros(512, 64))


# --- recorded runs ---------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", LEVELS)
def test_recorded_runs_round_as_the_lesson_does(kind, double):
    weight = weight_of((576, 192))
    recorded = round_4bit(weight, kind, double_quant=double)
    assert torch.equal(recorded, rounded(weight, kind, double_quant=double))
    assert not torch.equal(recorded, rounded(weight, kind, double_quant=not double))


def test_recorded_runs_round_rows_to_8_bits_as_the_lesson_does():
    weight, levels = weight_of((64, 192)), nf4.int_levels()
    parts = nf4.quantize_blocks(weight, levels, 192)
    ours = nf4.dequantize_blocks(*parts, levels).reshape(weight.shape)
    assert torch.equal(round_blocks(weight, levels_of("int8"), 192), ours)
    assert not torch.equal(round_blocks(weight, levels_of("int8"), 64), ours)
    with pytest.raises(ValueError, match="'nf3': expected int8"):
        levels_of("nf3")


# --- a card ----------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_4_bits_are_those_of_bitsandbytes_on_a_card(kind, dtype):
    """A card's kernel finds a level by comparisons of its own."""
    weight = weight_of((576, 192), dtype)
    packed, state = bnb.quantize_4bit(weight.cuda(), quant_type=kind)
    theirs = bnb.dequantize_4bit(packed, state).cpu().float()
    codes, absmax = nf4.quantize_blocks(weight, LEVELS[kind]())
    assert torch.equal(absmax, state.absmax.cpu())
    ours = rounded(weight, kind).to(dtype).float()
    scale = weight.float().abs().max()
    tolerance = max(1e-6, torch.finfo(dtype).eps) * scale
    assert ((ours - theirs).abs() <= tolerance).float().mean() >= 0.999
    assert not torch.allclose(1.01 * ours, theirs, atol=tolerance, rtol=0)
    if kind == "nf4":
        same = nf4.pack(codes) == packed.cpu().flatten()
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
