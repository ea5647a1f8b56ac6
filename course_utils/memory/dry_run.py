"""The exact memory engine: a training step on tensors that have no data.

The model is built from its configuration with fake tensors (shape and dtype, no
bytes), one forward, backward and optimizer step runs, and a dispatch mode adds up the
bytes of every storage alive. What bitsandbytes, TRL and a GPU do in kernels of their
own does not run on such tensors: stand-ins at the top allocate the same bytes at the
same moments, and do no arithmetic.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from course_utils.memory.formula import (
    KEPT_PARTS,
    TILE_TOKENS,
    TILE_WORDS,
    optimizer_state_bytes,
    quantization_constants,
)
from course_utils.parameters import attach, reason_of, skeleton

if TYPE_CHECKING:
    from course_utils.memory.estimate import Request


class _Matmul4bit(torch.autograd.Function):
    """x @ W.T with W dequantized for the moment, as bitsandbytes does it."""

    @staticmethod
    def forward(ctx, x, packed, shape):
        ctx.shape, ctx.dtype = shape, x.dtype
        ctx.save_for_backward(packed)
        weight = torch.empty(shape, dtype=x.dtype)
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        weight = torch.empty(ctx.shape, dtype=ctx.dtype)
        return grad.to(ctx.dtype) @ weight, None, None


def _linear4bit_class() -> type:
    """A `bitsandbytes` Linear4bit without data, so that PEFT wraps it as the real."""
    import bitsandbytes

    class Linear4bit(bitsandbytes.nn.Linear4bit):
        def __init__(self, linear, request):
            nn.Module.__init__(self)
            self.in_features = linear.in_features
            self.out_features = linear.out_features
            self.compute_dtype = getattr(torch, request.autocast or request.dtype)
            self.bias = linear.bias
            if self.bias is not None:
                self.bias.data = self.bias.data.to(getattr(torch, request.dtype))
            size = self.in_features * self.out_features
            packed = torch.empty(((size + 1) // 2, 1), dtype=torch.uint8)
            self.weight = bitsandbytes.nn.Params4bit(packed, requires_grad=False)
            self.weight.compress_statistics = request.double_quant
            self.weight.quant_type = request.quantization
            constants = quantization_constants(size, request.double_quant)
            for name, length, dtype in constants:
                tensor = torch.empty(length, dtype=getattr(torch, dtype))
                self.register_buffer(name, tensor)

        def forward(self, x):
            shape = (self.out_features, self.in_features)
            out = _Matmul4bit.apply(x.to(self.compute_dtype), self.weight, shape)
            if self.bias is not None:
                out = out + self.bias.to(out.dtype)
            return out.to(x.dtype)

    return Linear4bit


class _ChunkedLoss(torch.autograd.Function):
    """The allocations of TRL's chunked loss (trl/kernels/chunked_logprob.py): a tile
    of logits refilled for each part of the vocabulary, and fp32 gradients."""

    @staticmethod
    def forward(ctx, hidden, weight, autocast, count):
        ctx.save_for_backward(hidden, weight)
        ctx.compute, ctx.count = autocast or hidden.dtype, count
        rows = [torch.empty(len(hidden)) for _ in range(7)]
        _tile(ctx, hidden, weight)
        return rows[0].sum()

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        grad_hidden = torch.empty(hidden.shape)
        grad_weight = torch.empty(weight.shape) if ctx.needs_input_grad[1] else None
        tile = _tile(ctx, hidden, weight)
        grad_hidden = grad_hidden.to(hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        del tile
        return grad_hidden, grad_weight, None, None


def _tile(ctx, hidden, weight):
    shape = min(len(hidden), TILE_TOKENS), min(len(weight), TILE_WORDS)
    tile = torch.empty(shape, dtype=ctx.compute)
    ctx.count(tile, "logits")
    for wide in (hidden[: shape[0]], weight[: shape[1]]):
        wide.to(ctx.compute)
    return tile


class _GroupedMatmul(torch.autograd.Function):
    """The product of all experts (E, d_in, d_out): torch's fake one is for bfloat16."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.save_for_backward(weight, x if ctx.needs_input_grad[1] else None)
        return torch.empty(len(x), weight.shape[-1], dtype=x.dtype)

    @staticmethod
    def backward(ctx, grad):
        weight, x = ctx.saved_tensors
        grad_x = torch.empty(ctx.shape, dtype=ctx.dtype)
        return grad_x, None if x is None else torch.empty_like(weight)


class _Dropout(nn.Dropout):
    """Dropout with a mask of one byte per element, as on a GPU."""

    def forward(self, input):
        return torch.native_dropout(input, self.p, self.training)[0]


# --- the step --------------------------------------------------------------------


class _LiveBytes(TorchDispatchMode):
    """Adds up the bytes of all live storages by kind and keeps the largest sum."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size
        self.moment = "forward"
        self.live: dict[int, list] = {}
        self.now: dict[str, int] = {}
        self.total = 0
        self.peak, self.at_peak, self.peak_moment = 0, {}, "forward"

    def _freed(self, key: int) -> None:
        kind, size, _ = self.live.pop(key)
        self.now[kind] -= size
        self.total -= size

    def add(self, tensor: torch.Tensor, kind: str) -> None:
        """Count the tensor's storage as `kind`, once (a second call moves it)."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.live:
            self.now[self.live[key][0]] -= size
            self.live[key][0] = kind
        elif size:
            gone = weakref.ref(storage, lambda _, key=key: self._freed(key))
            self.live[key] = [kind, size, gone]
            self.total += size
        self.now[kind] = self.now.get(kind, 0) + size

    def add_gradient(self, parameter: nn.Parameter) -> None:
        self.add(parameter.grad, "gradients")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            is_tensor = isinstance(tensor, torch.Tensor)
            if is_tensor and tensor.untyped_storage()._cdata not in self.live:
                wide = tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size
                self.add(tensor, "logits" if wide else "activations")
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.now)
            self.peak_moment = self.moment
        return out


def _swap(model: nn.Module, old_type: type, make: Callable) -> None:
    """Replace the modules of exactly this type, where `make` gives another."""
    for name, module in list(model.named_modules()):
        if type(module) is old_type:
            model.set_submodule(name, make(module))


def _quantize(model: nn.Module, request: Request) -> None:
    """Put stand-ins where transformers puts 4-bit layers: it knows which it leaves."""
    from bitsandbytes.nn import Linear4bit
    from transformers import BitsAndBytesConfig
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.quantizers.base import HfQuantizer

    kept = model._keep_in_fp32_modules
    left = HfQuantizer.get_modules_to_not_convert(model, keep_in_fp32_modules=kept)
    replace_with_bnb_linear(model, left, BitsAndBytesConfig(load_in_4bit=True))
    packed = _linear4bit_class()
    _swap(model, Linear4bit, lambda module: packed(module, request))
    model.is_loaded_in_4bit = True


def _build(request: Request) -> nn.Module:
    """The model of the request on the meta device, adapters attached."""
    config = copy.deepcopy(request.config)
    config.get_text_config().use_cache = request.method == "prefix_tuning"
    dtype = getattr(torch, request.dtype)
    attention = "eager" if request.attention == "eager" else "sdpa"
    try:
        model = skeleton(config, dtype=dtype, attn_implementation=attention)
    except ValueError:  # some families have no fused attention
        model = skeleton(config, dtype=dtype, attn_implementation="eager")
    model = copy.deepcopy(model)
    kept = model._get_dtype_plan(dtype)  # in float32
    for name, parameter in model.named_parameters():
        if kept.keys() & name.split("."):
            parameter.data = parameter.data.to(torch.float32)
    if request.quantization:
        with torch.device("meta"):
            _quantize(model, request)
    if request.method == "full":
        return model
    model = attach(model, request.peft)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    _swap(model, nn.Dropout, lambda m: _Dropout(m.p) if m.p > 0 else m)
    return model


def _give_storage(model: nn.Module, count: _LiveBytes, full: bool) -> None:
    """Replace meta tensors by fake CPU tensors, ties kept, and count them by kind.

    `Module.to` refuses fake tensors, and fake CUDA tensors abort a CPU build of torch.
    """
    # by the id of the old tensor, which is held so that no other gets its id
    replaced: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in model.modules():
        packed = hasattr(module, "compute_dtype") and hasattr(module, "absmax")
        tables = "quantization" if packed else "activations"  # as rotary frequencies
        for store in (module._parameters, module._buffers):
            for name, old in store.items():
                if old is None:
                    continue
                if id(old) not in replaced:
                    new, kind = torch.empty(old.shape, dtype=old.dtype), tables
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                        added = old.requires_grad and not full
                        kind = "adapters" if added else "weights"
                    count.add(new, kind)
                    replaced[id(old)] = old, new
                store[name] = replaced[id(old)][1]


def _optimizer_state(request: Request, model: nn.Module, count: _LiveBytes) -> list:
    """The state that the optimizer keeps, as tensors."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    state = []
    for p in filter(lambda p: p.requires_grad, model.parameters()):
        size = optimizer_state_bytes(
            request.optimizer, p.numel(), p.dtype.itemsize, embedding=id(p) in tables
        )
        state.append(torch.empty(size, dtype=torch.uint8))
        count.add(state[-1], "optimizer")
    return state


def _prepare(model: nn.Module, request: Request, count: _LiveBytes) -> None:
    model.train()
    if request.gradient_checkpointing:
        options = {"use_reentrant": False, "preserve_rng_state": False}
        # newer transformers have another name for it
        with warnings.catch_warnings(action="ignore"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        if request.method != "full":
            model.enable_input_require_grads()
    if request.loss == "chunked":
        base = model if request.method == "full" else model.get_base_model()
        head, hands_on = base.get_output_embeddings(), nn.Identity()
        hands_on.weight = head.weight
        _swap(base, type(head), lambda module: hands_on if module is head else module)
        cast = request.autocast and getattr(torch, request.autocast)
        base.loss_function = lambda logits, labels, *_, **__: _ChunkedLoss.apply(
            logits[:, :-1].reshape(-1, logits.shape[-1]), head.weight, cast, count.add
        )


def _autocast(request: Request) -> contextlib.ExitStack:
    """Autocast on the CPU, where libraries that ask for a card's believe it is on."""
    stack = contextlib.ExitStack()
    if request.autocast:
        dtype = getattr(torch, request.autocast)
        stack.enter_context(torch.autocast("cpu", dtype=dtype))
        stack.enter_context(patch("torch.is_autocast_enabled", lambda *_: True))
    return stack


def _without_data(request: Request) -> contextlib.ExitStack:
    """Ways through transformers that look into no tensor, and run in every dtype."""
    stack, library = contextlib.ExitStack(), "transformers."
    # one document a row
    name = library + "masking_utils.find_packed_sequence_indices"
    stack.enter_context(patch(name, lambda position_ids: None))
    # experts: cards that compute in float16 have no kernel, but transformers' loop
    name = library + "integrations.moe._can_use_grouped_mm"
    stack.enter_context(patch(name, lambda *_: request.autocast != "float16"))
    product = {"grouped_mm": lambda x, w, offs: _GroupedMatmul.apply(x, w)}
    stack.enter_context(patch.multiple(nn.functional, create=True, **product))
    # what fails is said once, without a page of torch's own
    log = logging.getLogger("torch._subclasses.fake_tensor")
    stack.enter_context(patch.object(log, "disabled", True))
    return stack


def dry_run(request: Request) -> tuple[dict, dict, str, int]:
    """Run one training step without data; the same answer as `closed_form`.

    Raises ValueError: transformers or PEFT builds no such model, or no step of it runs.
    """
    model = _build(request)
    try:
        return _step(model, request)
    except Exception as error:  # of whatever class: each family has its own
        family = request.config.model_type
        raise ValueError(
            f"no step of {request.method} on {family!r} runs without data: "
            f"{reason_of(error)}; try a real one, under measure_memory()"
        ) from error


def _step(model: nn.Module, request: Request) -> tuple[dict, dict, str, int]:
    count = _LiveBytes(request.config.get_text_config().vocab_size)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _give_storage(model, count, request.method == "full")
        trained = [p for p in model.parameters() if p.requires_grad]
        state = _optimizer_state(request, model, count)
        static = {name: count.now.get(name, 0) for name in KEPT_PARTS}
        static["gradients"] = sum(p.numel() * p.dtype.itemsize for p in trained)
        for p in trained:
            if request.gradient_accumulation:
                p.grad = torch.empty_like(p)
                count.add_gradient(p)
            p.register_post_accumulate_grad_hook(count.add_gradient)
        _prepare(model, request, count)
        shape = request.batch_size, request.sequence_length
        math = request.attention == "math"
        attention = sdpa_kernel(SDPBackend.MATH) if math else contextlib.nullcontext()
        with count, attention, _without_data(request):
            ids = torch.zeros(shape, dtype=torch.long)
            mask = torch.ones(shape, dtype=torch.long) if request.padding else None
            with _autocast(request):
                loss = model(input_ids=ids, labels=ids, attention_mask=mask).loss
            count.moment = "backward"
            loss.backward()
        del state
    return count.at_peak, static, count.peak_moment, sum(p.numel() for p in trained)
