"""Stand-ins for the exact memory engine: the same allocations, no arithmetic.

What bitsandbytes, TRL and a GPU do in kernels of their own does not run on tensors
without data; these do, and allocate the same bytes at the same moments.
"""

from __future__ import annotations

import torch
from torch import nn

from course_utils.memory_formula import TILE_TOKENS, TILE_WORDS
from course_utils.memory_static import quantization_constants


class Matmul4bit(torch.autograd.Function):
    """x @ W.T with W dequantized for the moment, as bitsandbytes does it."""

    @staticmethod
    def forward(ctx, x, packed, shape):
        ctx.shape, ctx.dtype = shape, x.dtype
        ctx.save_for_backward(packed)
        weight = torch.empty(shape, dtype=x.dtype, device=x.device)
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        weight = torch.empty(ctx.shape, dtype=ctx.dtype, device=grad.device)
        return grad.to(ctx.dtype) @ weight, None, None


def linear4bit_class() -> type:
    """A `bitsandbytes` Linear4bit without data, so that PEFT wraps it as the real."""
    import bitsandbytes

    class Linear4bit(bitsandbytes.nn.Linear4bit):
        def __init__(self, linear, request):
            nn.Module.__init__(self)
            self.in_features, self.out_features = linear.weight.shape[::-1]
            self.compute_dtype = getattr(torch, request.autocast or request.dtype)
            self.bias = linear.bias
            device, size = linear.weight.device, linear.weight.numel()
            packed = torch.empty(((size + 1) // 2, 1), dtype=torch.uint8, device=device)
            self.weight = nn.Parameter(packed, requires_grad=False)
            self.weight.compress_statistics = request.double_quant
            self.weight.quant_type = request.quantization
            for name, length, dtype in quantization_constants(
                size, request.double_quant
            ):
                dtype = getattr(torch, dtype)
                tensor = torch.empty(length, dtype=dtype, device=device)
                self.register_buffer(name, tensor)

        def forward(self, x):
            shape = (self.out_features, self.in_features)
            out = Matmul4bit.apply(x.to(self.compute_dtype), self.weight, shape)
            if self.bias is not None:
                out = out + self.bias.to(out.dtype)
            return out.to(x.dtype)

    return Linear4bit


class ChunkedLoss(torch.autograd.Function):
    """The allocations of TRL's chunked loss (trl/kernels/chunked_logprob.py): a tile
    of logits refilled for each part of the vocabulary, and fp32 gradients."""

    @staticmethod
    def forward(ctx, hidden, weight, autocast, count):
        ctx.save_for_backward(hidden, weight)
        ctx.compute, ctx.count = autocast or hidden.dtype, count
        rows = [torch.empty(len(hidden), device=hidden.device) for _ in range(7)]
        tile = _tile(ctx, hidden, weight)
        del tile
        return rows[0].sum()

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        grad_hidden = torch.empty(hidden.shape, device=hidden.device)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty(weight.shape, device=weight.device)
        tile = _tile(ctx, hidden, weight)
        grad_hidden = grad_hidden.to(hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        del tile
        return grad_hidden, grad_weight, None, None


def _tile(ctx, hidden, weight):
    shape = min(len(hidden), TILE_TOKENS), min(len(weight), TILE_WORDS)
    tile = torch.empty(shape, dtype=ctx.compute, device=hidden.device)
    ctx.count(tile, "logits")
    for wide in (hidden[: shape[0]], weight[: shape[1]]):
        wide.to(ctx.compute)
    return tile


class HiddenHead(nn.Module):
    """An output layer that hands the hidden states on; the loss does the rest."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, hidden):
        return hidden


class Dropout(nn.Module):
    """Dropout with a mask of one byte per element, as on a GPU."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x):
        return torch.native_dropout(x, self.p, self.training)[0]
