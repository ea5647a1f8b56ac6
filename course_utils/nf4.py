"""Four bits a weight, from scratch: lesson 07 builds it, later lessons use it.

NF4, its code book and double quantization are those of QLoRA (Dettmers and others,
2023, arXiv 2305.14314, section 3 and appendix E); bytes and values equal those of
bitsandbytes on a CPU.

>>> weight = torch.linspace(-1, 1, 128).reshape(2, 64)
>>> four_bit = quantize_4bit(weight, "nf4")
>>> four_bit.packed.shape, four_bit.bits_per_parameter
(torch.Size([64]), 4.5)
>>> round((four_bit.dequantize() - weight).abs().max().item(), 2)
0.15
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def int_levels(bits: int = 8) -> torch.Tensor:
    """Evenly spaced levels from -1 to 1: (2**bits - 1,), in float32.

    Absmax quantization: codes from -127 to 127 for 8 bits, from -7 to 7 for 4.

    >>> int_levels(2).tolist()
    [-1.0, 0.0, 1.0]
    """
    top = 2 ** (bits - 1) - 1
    return torch.arange(-top, top + 1) / top


def fp4_levels() -> torch.Tensor:
    """The 15 values of a 4-bit float: 1 sign, 2 exponent and 1 mantissa bit.

    The sixteenth pattern is a second zero.
    """
    positive = torch.tensor([0.0625, 2, 3, 4, 6, 8, 12]) / 12
    return torch.cat([-positive.flip(0), torch.zeros(1), positive])


def nf4_levels() -> torch.Tensor:
    """The 16 levels of NF4: quantiles of a normal distribution, scaled to [-1, 1].

    Eight positive and seven negative ones, and zero, so that a zero stays a zero.
    """
    edge = 1 - (1 / 32 + 1 / 30) / 2
    positive = torch.special.ndtri(torch.linspace(edge, 0.5, 9).double())[:-1]
    negative = -torch.special.ndtri(torch.linspace(edge, 0.5, 8).double())[:-1]
    levels = torch.cat([negative, torch.zeros(1).double(), positive.flip(0)])
    return (levels / levels.max()).float()


def quantize_blocks(
    weight: torch.Tensor, levels: torch.Tensor, block: int = 64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide each block by its largest absolute value; take the nearest level.

    Args:
        weight: any shape; the number of its elements is a multiple of `block`.
        levels: rising values from -1 to 1.
        block: elements that share a scale.

    Returns:
        The index of each element's level (blocks, block) in uint8, and the scales, the
        "absmax" of each block (blocks,) in float32.
    """
    blocks = weight.float().reshape(-1, block)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
    midpoints = (levels[:-1] + levels[1:]) / 2
    return torch.bucketize(scaled, midpoints).to(torch.uint8), absmax


def dequantize_blocks(
    codes: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor
) -> torch.Tensor:
    """Levels times scales: (blocks, block) in float32.

    Args:
        codes, absmax: as `quantize_blocks` returns them.
        levels: those that it was given.
    """
    return levels[codes.long()] * absmax[:, None]


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the first in the upper half: (n,) in uint8 for 2 n codes.

    Args:
        codes: from 0 to 15, in uint8, an even number of them.

    >>> pack(torch.tensor([1, 15], dtype=torch.uint8)).item()
    31
    """
    pairs = codes.reshape(-1, 2)
    return (pairs[:, 0] << 4) | pairs[:, 1]


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """Undo `pack`: (2 n,) codes from 0 to 15 in uint8.

    Args:
        packed: (n,) in uint8.
    """
    return torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)


def dynamic_levels() -> torch.Tensor:
    """The 256 levels of bitsandbytes' 8-bit type, which double quantization uses.

    Finer near zero: each decade from 1e-7 to 1 has twice the levels of the one below
    (Dettmers, 2015, arXiv 1511.04561).
    """
    positive = [torch.tensor([1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        positive.append(10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2)
    positive = torch.cat(positive)
    levels = torch.cat([positive, -positive[1:], torch.zeros(1)])
    return levels.sort().values


def quantize_absmax(
    absmax: torch.Tensor, block: int = 256
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Double quantization: the scales, less their mean, in 8 bits.

    Args:
        absmax: (blocks,) in float32.
        block: scales that share a scale of their own.

    Returns:
        Codes (blocks,) in uint8, the scales' scales (about blocks / 256,) and the mean.
    """
    mean = absmax.mean()
    padded = torch.nn.functional.pad(absmax - mean, (0, -len(absmax) % block))
    codes, absmax2 = quantize_blocks(padded, dynamic_levels(), block)
    return codes.reshape(-1)[: len(absmax)], absmax2, mean


def dequantize_absmax(
    codes: torch.Tensor, absmax2: torch.Tensor, mean: torch.Tensor, block: int = 256
) -> torch.Tensor:
    """Undo `quantize_absmax`, up to its rounding: (blocks,) in float32.

    Args:
        codes, absmax2, mean: as `quantize_absmax` returns them.
        block: the one that it was given.
    """
    scales = absmax2.repeat_interleave(block)[: len(codes)]
    return dynamic_levels()[codes.long()] * scales + mean


def bits_per_parameter(
    block: int = 64, double_quant: bool = False, bits: int = 4
) -> float:
    """Bits that one weight takes, its share of the scales included.

    `bits` for the code, and one float32 for each block; with double quantization one
    byte for each block, and one float32 for 256 blocks.

    Args:
        block: elements that share a scale.
        double_quant: whether the scales are quantized too.
        bits: of a code.

    >>> bits_per_parameter(), round(bits_per_parameter(double_quant=True), 3)
    (4.5, 4.127)
    """
    per_block = 8 + 32 / 256 if double_quant else 32
    return bits + per_block / block


#: Name -> the function that makes its levels.
LEVELS = {"nf4": nf4_levels, "fp4": fp4_levels, "int4": lambda: int_levels(4)}


@dataclass(frozen=True)
class FourBit:
    """A weight in 4 bits.

    Attributes:
        packed: two codes a byte.
        absmax: scales of the blocks: float32, or uint8 after double quantization.
        absmax2, mean: what undoes double quantization, or None.
        kind, block, shape: of the code book, and of the original weight.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    absmax2: torch.Tensor | None
    mean: torch.Tensor | None
    kind: str
    block: int
    shape: torch.Size

    @property
    def bits_per_parameter(self) -> float:
        """Bits a weight, counted from the tensors that are kept for each block."""
        kept = (self.packed, self.absmax, self.absmax2)
        kept_bytes = sum(t.nbytes for t in kept if t is not None)
        return 8 * kept_bytes / self.shape.numel()

    def dequantize(self) -> torch.Tensor:
        """The weight that these 4 bits stand for, in float32 and its old shape."""
        absmax = self.absmax
        if self.absmax2 is not None:
            absmax = dequantize_absmax(absmax, self.absmax2, self.mean)
        codes = unpack(self.packed).reshape(-1, self.block)
        levels = LEVELS[self.kind]()
        return dequantize_blocks(codes, absmax, levels).reshape(self.shape)


def quantize_4bit(
    weight: torch.Tensor,
    kind: str = "nf4",
    *,
    block: int = 64,
    double_quant: bool = False,
) -> FourBit:
    """Quantize a weight to 4 bits.

    Args:
        weight: float32, bfloat16 or float16, of any shape, on any device; the result
            is made and lies on the CPU.
        kind: a name in `LEVELS`.
        block: elements that share a scale, one of `BLOCK_SIZES`, as in bitsandbytes;
            it must divide the number of elements.
        double_quant: quantize the scales too.

    Raises:
        TypeError: the weight is no floating-point tensor.
        ValueError: an unknown kind; a block size that is unknown, or does not divide
            the weight; a weight that is empty, or holds NaN or infinity.
    """
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        found = getattr(weight, "dtype", type(weight).__name__)
        raise TypeError(f"quantize_4bit takes a floating-point tensor, not {found}")
    if kind not in LEVELS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(LEVELS)}")
    if not isinstance(block, int) or block not in BLOCK_SIZES:
        raise ValueError(
            f"block {block!r} is none of {', '.join(map(str, BLOCK_SIZES))}"
        )
    if not weight.numel() or weight.numel() % block:
        raise ValueError(
            f"a weight of shape {tuple(weight.shape)} has {weight.numel()} elements, "
            f"which blocks of {block} do not divide"
        )
    if not torch.isfinite(weight).all():
        raise ValueError("the weight holds NaN or infinity: no scale fits it")
    weight = weight.detach().cpu()
    codes, absmax = quantize_blocks(weight, LEVELS[kind](), block)
    absmax2 = mean = None
    if double_quant:
        absmax, absmax2, mean = quantize_absmax(absmax)
    return FourBit(pack(codes), absmax, absmax2, mean, kind, block, weight.shape)
