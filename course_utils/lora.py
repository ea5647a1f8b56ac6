"""LoRA from scratch: small matrices beside frozen ones. Built in lesson 03.

A linear layer keeps its weight W (d_out, d_in); beside it stand A (r, d_in) and
B (d_out, r), and the layer computes

    y = W x + alpha / r * B A x

Source: arXiv:2106.09685, section 4.1.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn

__all__ = ["LoRALinear", "eject_lora", "inject_lora", "lora_layers"]


class LoRALinear(nn.Module):
    """A frozen linear layer with two small trainable matrices beside it.

    A is Gaussian and B is zero, so that a new layer computes what the old one did.

    Args:
        base: the layer that is kept; its parameters no longer ask for gradients.
        A: (r, d_in).
        B: (d_out, r).
        scaling: factor of B A, `alpha / r`.

    Examples:
        >>> layer = LoRALinear.from_linear(nn.Linear(6, 4), r=2, alpha=4)
        >>> tuple(layer.A.shape), tuple(layer.B.shape), layer.scaling
        ((2, 6), (4, 2), 2.0)
    """

    def __init__(
        self, base: nn.Linear, A: torch.Tensor, B: torch.Tensor, scaling: float
    ) -> None:
        super().__init__()
        self.base, self.scaling = base.requires_grad_(False), scaling
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    @classmethod
    def from_linear(cls, linear: nn.Linear, r: int, alpha: float) -> LoRALinear:
        """Put new matrices of rank `r` beside a layer, in float32, on its device."""
        (d_out, d_in), device = linear.weight.shape, linear.weight.device
        A = torch.randn(r, d_in, device=device) / r
        B = torch.zeros(d_out, r, device=device)
        return cls(linear, A, B, alpha / r)

    def delta(self) -> torch.Tensor:
        """The change of the weight, (d_out, d_in), of rank r at most."""
        return self.scaling * self.B @ self.A

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., d_in) to (..., d_out), in the dtype of the base layer."""
        y = self.base(x)
        update = x.to(self.A.dtype) @ self.A.T @ self.B.T
        return y + (self.scaling * update).to(y.dtype)

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A plain layer whose weight is W + alpha / r B A; this one stays as it is."""
        merged = copy.deepcopy(self.base)
        merged.weight += self.delta().to(merged.weight.dtype)
        return merged


def inject_lora(
    model: nn.Module, targets: Iterable[str], r: int, alpha: float
) -> nn.Module:
    """Freeze a model and put a `LoRALinear` in the place of each target, in place.

    Args:
        model: any model.
        targets: last parts of the layers' names, such as `["q_proj", "v_proj"]`.
        r: rank.
        alpha: B A counts `alpha / r` times.

    Returns:
        The same model.
    """
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in targets and isinstance(child, nn.Linear):
                setattr(parent, name, LoRALinear.from_linear(child, r, alpha))
    return model


def eject_lora(model: nn.Module, *, merge: bool = False) -> nn.Module:
    """Put plain linear layers back in place: the old ones, or with A and B merged in.

    Args:
        model: what `inject_lora` returned.
        merge: add each change to its weight; False drops A and B.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                plain = child.to_linear() if merge else child.base
                setattr(parent, name, plain)
    return model


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The `LoRALinear` layers of a model by their full names."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
