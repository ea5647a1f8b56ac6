"""PiSSA from scratch: lesson 04 builds it, later lessons use it.

PiSSA (Meng and others, 2024, arXiv 2404.02948, equations 2 to 4) starts an adapter
from the largest singular directions of the weight itself, and freezes the rest.
"""

from __future__ import annotations

import torch


def pissa_init(
    weight: torch.Tensor, r: int, alpha: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split a weight into a trainable principal part and a frozen residual.

    Args:
        weight: a matrix (out, in), as `nn.Linear` keeps it.
        r: rank, at most the smaller side of the weight.
        alpha: LoRA's `alpha`; the adapter is scaled by `alpha / r`.

    Returns:
        `A` (r, in) and `B` (out, r) in float32, and the residual (out, in) in the
        weight's dtype, with `alpha / r * B @ A + residual` equal to the weight.

    >>> A, B, residual = pissa_init(torch.diag(torch.tensor([4.0, 1.0])), 1, 1)
    >>> (B @ A).round().tolist(), residual.round().abs().tolist()
    ([[4.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]])
    """
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    root = (S[:r] * r / alpha).sqrt()  # the adapter is scaled by alpha / r
    A = root[:, None] * Vh[:r]
    B = U[:, :r] * root
    residual = weight.float() - alpha / r * B @ A
    return A, B, residual.to(weight.dtype)


def pissa_to_lora(
    A: torch.Tensor, B: torch.Tensor, A0: torch.Tensor, B0: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn a trained PiSSA adapter into a plain LoRA for the original weight.

    The change of the weight is `B @ A - B0 @ A0`, one product of twice the rank. The
    scale `alpha / r` stays the same, so a converted adapter has twice the `alpha` too.

    Args:
        A: trained (r, in).
        B: trained (out, r).
        A0: `A` before training (r, in).
        B0: `B` before training (out, r).

    Returns:
        `A` (2 r, in) and `B` (out, 2 r) of the plain LoRA.

    >>> one = torch.ones(1, 1)
    >>> A, B = pissa_to_lora(2 * one, 3 * one, one, one)
    >>> (B @ A).item(), A.shape[0]
    (5.0, 2)
    """
    return torch.cat([A, A0]), torch.cat([B, -B0], dim=1)
