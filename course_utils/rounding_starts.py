"""Rounding to 4 or 8 bits, and adapters that start from what it loses: recorded runs.

Lesson 7 builds the same in its cells. bitsandbytes rounds near ties, and one scale in
some hundreds, to the other neighbour, so recorded numbers need this arithmetic.

NF4 and double quantization: QLoRA, Dettmers and others, 2023, arXiv 2305.14314,
section 3 and appendix E. LoftQ: Li and others, 2023, arXiv 2310.08659, algorithm 1.
QPiSSA: Meng and others, 2024, arXiv 2404.02948, section 4. Both choose A, B and a
rounded weight Q so that `Q + alpha / r * B @ A` is nearer to the original than Q alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    Rounding = Callable[[torch.Tensor], torch.Tensor]
    Start = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def levels_of(kind: str) -> torch.Tensor:
    """The rising levels from -1 to 1 of `"int8"`, `"int4"`, `"fp4"` or `"nf4"`.

    Raises:
        ValueError: an unknown kind.

    >>> levels_of("int4").mul(7).int().tolist()[:3], len(levels_of("nf4"))
    ([-7, -6, -5], 16)
    """
    import torch

    if kind in ("int8", "int4"):
        top = 2 ** (int(kind[3:]) - 1) - 1
        return torch.arange(-top, top + 1) / top
    if kind == "fp4":  # the sixteenth pattern is a second zero
        positive = torch.tensor([0.0625, 2, 3, 4, 6, 8, 12]) / 12
        return torch.cat([-positive.flip(0), torch.zeros(1), positive])
    if kind == "nf4":  # quantiles of a normal distribution, eight positive, seven not
        edge = 1 - (1 / 32 + 1 / 30) / 2
        positive = torch.special.ndtri(torch.linspace(edge, 0.5, 9).double())[:-1]
        negative = -torch.special.ndtri(torch.linspace(edge, 0.5, 8).double())[:-1]
        levels = torch.cat([negative, torch.zeros(1).double(), positive.flip(0)])
        return (levels / levels.max()).float()
    raise ValueError(f"levels {kind!r}: expected int8, int4, fp4 or nf4")


def round_blocks(
    weight: torch.Tensor,
    levels: torch.Tensor,
    block: int,
    scale_rounding: Rounding | None = None,
) -> torch.Tensor:
    """Round each element to the nearest level times its block's largest absolute value.

    Args:
        weight: any shape; the number of its elements is a multiple of `block`.
        levels: rising values from -1 to 1.
        block: elements that share a scale.
        scale_rounding: what happens to the scales (blocks,); None keeps them exact.

    Returns:
        The rounded weight, in float32 and the same shape.
    """
    import torch

    blocks = weight.float().reshape(-1, block)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2)
    scales = scale_rounding(absmax) if scale_rounding else absmax
    return (levels[codes] * scales[:, None]).reshape(weight.shape)


def round_scales(absmax: torch.Tensor) -> torch.Tensor:
    """Double quantization: scales (blocks,) less their mean in 8 bits, and back."""
    from bitsandbytes.functional import create_dynamic_map
    from torch.nn.functional import pad

    mean = absmax.mean()
    padded = pad(absmax - mean, (0, -len(absmax) % 256))
    return round_blocks(padded, create_dynamic_map(), 256)[: len(absmax)] + mean


def round_4bit(
    weight: torch.Tensor, kind: str = "nf4", *, double_quant: bool = False
) -> torch.Tensor:
    """The weight after its trip through 4 bits in blocks of 64, on the CPU."""
    scale_rounding = round_scales if double_quant else None
    return round_blocks(weight.detach().cpu(), levels_of(kind), 64, scale_rounding)


def low_rank(
    matrix: torch.Tensor, r: int, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best A (r, in) and B (out, r), `alpha / r * B @ A` nearest to the matrix.

    By a randomised SVD with 16 rounds; of the exact one's share of the squared sum it
    finds all but some thousandths.
    """
    import torch

    q = min(2 * r, *matrix.shape)
    U, S, V = torch.svd_lowrank(matrix.float(), q, niter=16)
    root = (S[:r] * r / alpha).sqrt()
    return root[:, None] * V[:, :r].T, U[:, :r] * root


def qpissa_init(
    weight: torch.Tensor, r: int, alpha: float, rounding: Rounding
) -> Start:
    """QPiSSA: the principal part is the adapter, what is left is rounded.

    Args:
        weight: (out, in).
        r: rank.
        alpha: LoRA's `alpha`.
        rounding: from a weight to the same weight after its trip through 4 bits.

    Returns:
        `A` (r, in), `B` (out, r) and the rounded residual (out, in), in float32.
    """
    A, B = low_rank(weight, r, alpha)
    return A, B, rounding(weight - alpha / r * B @ A)


def loftq_init(
    weight: torch.Tensor, r: int, alpha: float, rounding: Rounding, rounds: int = 1
) -> Start:
    """LoftQ: round, then put the best part of the error into the adapter, in turn.

    Arguments and result are those of `qpissa_init`; with one of the `rounds` the
    rounded weight is plain 4-bit.
    """
    import torch

    update = torch.zeros_like(weight)
    for _ in range(rounds):
        rounded = rounding(weight - update)
        A, B = low_rank(weight - rounded, r, alpha)
        update = alpha / r * B @ A
    return A, B, rounded


def set_start(model: Any, originals: Mapping[str, torch.Tensor], start: Any) -> int:
    """Give a PEFT model on 4-bit weights another start, in place.

    Args:
        model: a `PeftModel` with LoRA layers on bitsandbytes' 4-bit layers.
        originals: the weights before quantization, by the base model's names.
        start: `qpissa_init`, or `loftq_init`, or another function of the same kind.

    Returns:
        How many layers were changed.
    """
    from bitsandbytes.nn import Params4bit

    changed = 0
    for name, layer in model.get_base_model().named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        old = layer.base_layer.weight
        kind, double = old.quant_type, old.compress_statistics
        rounding = functools.partial(round_4bit, kind=kind, double_quant=double)
        (adapter,) = layer.active_adapters
        r, scaling = layer.r[adapter], layer.scaling[adapter]
        original = originals[f"{name}.weight"].cpu()  # where the levels are
        A, B, rounded = start(original, r, scaling * r, rounding)
        layer.lora_A[adapter].weight.data.copy_(A)
        layer.lora_B[adapter].weight.data.copy_(B)
        new = Params4bit(
            rounded.to(old.quant_state.dtype),
            requires_grad=False,
            compress_statistics=double,
            quant_type=kind,
        )
        layer.base_layer.weight = new.to(old.device)
        changed += 1
    return changed
