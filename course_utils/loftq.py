"""Adapters that start from what 4 bits lose: LoftQ and QPiSSA, by hand.

Both choose A, B and a 4-bit weight Q together, so that `Q + alpha / r * B @ A` is
nearer to the original weight than Q alone. LoftQ: Li and others, 2023, arXiv
2310.08659, algorithm 1. QPiSSA: Meng and others, 2024, arXiv 2404.02948, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Rounding = Callable[[torch.Tensor], torch.Tensor]
Start = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def low_rank(
    matrix: torch.Tensor, r: int, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best A (r, in) and B (out, r), `alpha / r * B @ A` nearest to the matrix.

    By a randomised SVD with 16 rounds; of the exact one's share of the squared sum it
    finds all but some thousandths.

    Args:
        matrix: (out, in).
        r: rank.
        alpha: LoRA's `alpha`.
    """
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

    Args:
        weight: (out, in).
        r: rank.
        alpha: LoRA's `alpha`.
        rounding: from a weight to the same weight after its trip through 4 bits.
        rounds: of rounding and taking apart; with 1 the rounded weight is plain 4-bit.

    Returns:
        As `qpissa_init`.
    """
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

    from course_utils.nf4 import quantize_4bit

    changed = 0
    for name, layer in model.get_base_model().named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        old = layer.base_layer.weight
        kind, double = old.quant_type, old.compress_statistics

        def rounding(weight: torch.Tensor, kind=kind, double=double) -> torch.Tensor:
            return quantize_4bit(weight, kind, double_quant=double).dequantize()

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
