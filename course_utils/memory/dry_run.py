"""The exact memory engine: a training step on tensors that have no data.

The model is built from its configuration with fake tensors (shape and dtype, no
bytes), one forward, backward and optimizer step runs, and a dispatch mode adds up the
bytes of every storage alive. It needs no weights and no GPU. What bitsandbytes, TRL and
a GPU do in kernels of their own does not run on such tensors: stand-ins at the top
allocate the same bytes at the same moments, and do no arithmetic.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
import weakref
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from course_utils.memory.formula import (
    TILE_TOKENS,
    TILE_WORDS,
    optimizer_state_bytes,
    quantization_constants,
)

if TYPE_CHECKING:
    from course_utils.memory.estimate import Request


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


def _linear4bit_class() -> type:
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
            constants = quantization_constants(size, request.double_quant)
            for name, length, dtype in constants:
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


# --- the step --------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
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

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            if tensor.untyped_storage()._cdata not in self.live:
                wide = tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size
                self.add(tensor, "logits" if wide else "activations")
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.now)
            self.peak_moment = self.moment
        return out


def _swap(model: nn.Module, wanted, make) -> None:
    for name, module in list(model.named_modules()):
        if wanted(module):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, make(module))


def _build(request: Request) -> nn.Module:
    """The model of the request on the meta device, adapters attached."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(request.config)
    config.use_cache = request.method == "prefix_tuning"
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    attention = "eager" if request.attention == "eager" else "sdpa"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, request.dtype), attn_implementation=attention
        )
        if request.quantization:
            packed, head = _linear4bit_class(), model.get_output_embeddings()
            _swap(
                model,
                lambda m: type(m) is nn.Linear and m is not head,
                lambda m: packed(m, request),
            )
            model.is_loaded_in_4bit = True
        if request.method == "full":
            return model
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        peft = copy.deepcopy(request.peft)
        peft.task_type = peft.task_type or "CAUSAL_LM"
        peft.inference_mode = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(model, peft, low_cpu_mem_usage=True)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float32)
    _swap(model, lambda m: type(m) is nn.Dropout and m.p > 0, lambda m: Dropout(m.p))
    return model


def _give_storage(model: nn.Module, count: LiveBytes) -> None:
    """Replace meta tensors by fake CPU tensors, ties kept, and count them by kind.

    `Module.to` refuses fake tensors, and fake CUDA tensors abort a CPU build of torch.
    """
    # by the id of the old tensor, which is held so that no other gets its id
    replaced: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in model.modules():
        packed = hasattr(module, "compute_dtype") and hasattr(module, "absmax")
        for store in (module._parameters, module._buffers):
            for name, old in list(store.items()):
                if old is None:
                    continue
                if id(old) not in replaced:
                    new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                    kind = "activations"  # tables such as the rotary frequencies
                    if packed and store is module._buffers:
                        kind = "quantization"
                    elif isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                        kind = "adapters" if old.requires_grad else "weights"
                    count.add(new, kind)
                    replaced[id(old)] = old, new
                store[name] = replaced[id(old)][1]


def _optimizer_state(request: Request, model: nn.Module, count: LiveBytes):
    """The state that the optimizer keeps, as tensors, and the bytes that are paged."""
    state, paged = [], 0
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    for p in model.parameters():
        if not p.requires_grad:
            continue
        size, movable = optimizer_state_bytes(
            request.optimizer,
            p.numel(),
            p.dtype.itemsize,
            embedding=any(p is table for table in tables),
        )
        paged += movable
        if size:
            state.append(torch.empty(size, dtype=torch.uint8))
            count.add(state[-1], "optimizer")
    return state, paged


def _prepare(model: nn.Module, request: Request, count: LiveBytes) -> None:
    model.train()
    if request.gradient_checkpointing:
        options = {"use_reentrant": False, "preserve_rng_state": False}
        with warnings.catch_warnings():  # newer transformers have another name for it
            warnings.simplefilter("ignore")
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        if request.method != "full":
            model.enable_input_require_grads()
    if request.loss == "chunked":
        base = model if request.method == "full" else model.get_base_model()
        head = base.get_output_embeddings()
        base.lm_head = HiddenHead(head.weight)
        cast = request.autocast and getattr(torch, request.autocast)
        base.loss_function = lambda logits, labels, **_: ChunkedLoss.apply(
            logits[:, :-1].reshape(-1, logits.shape[-1]), head.weight, cast, count.add
        )


@contextlib.contextmanager
def _autocast(request: Request):
    """Autocast on the CPU, where libraries that ask for a card's believe it is on."""
    if not request.autocast:
        yield
        return
    dtype = getattr(torch, request.autocast)
    with (
        torch.autocast("cpu", dtype=dtype),
        patch("torch.is_autocast_enabled", lambda *_: True),
    ):
        yield


def _no_packing():
    """Let transformers see one document a row: it cannot look into fake positions, and
    would build a mask for packed rows."""
    name = "transformers.masking_utils.find_packed_sequence_indices"
    return patch(name, lambda position_ids: None)


def dry_run(request: Request) -> dict[str, Any]:
    """Run one training step without data.

    Returns:
        ``parts`` (bytes alive at the peak, by kind), ``static_parts`` (bytes kept from
        step to step), ``moment`` of the peak, ``trainable`` parameters.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    model = _build(request)
    count = LiveBytes(request.config.vocab_size)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _give_storage(model, count)
        trained = [p for p in model.parameters() if p.requires_grad]
        if request.method == "full":
            for p in trained:
                count.add(p, "weights")
        state, paged = _optimizer_state(request, model, count)
        kinds = ("weights", "quantization", "adapters", "gradients", "optimizer")
        static = {kind: count.now.get(kind, 0) for kind in kinds}
        static["gradients"] = sum(p.numel() * p.dtype.itemsize for p in trained)
        for p in trained:
            if request.gradient_accumulation:
                p.grad = torch.empty_like(p)
                count.add(p.grad, "gradients")
            p.register_post_accumulate_grad_hook(
                lambda p: count.add(p.grad, "gradients")
            )
        _prepare(model, request, count)
        shape = request.batch_size, request.sequence_length
        attention = contextlib.nullcontext()
        if request.attention == "math":
            attention = sdpa_kernel(SDPBackend.MATH)
        with count, attention, _no_packing():
            ids = torch.zeros(shape, dtype=torch.long)
            mask = torch.ones(shape, dtype=torch.long) if request.padding else None
            with _autocast(request):
                loss = model(input_ids=ids, labels=ids, attention_mask=mask).loss
            count.moment = "backward"
            loss.backward()
        del state
    return {
        "parts": count.at_peak,
        "static_parts": static,
        "moment": count.peak_moment,
        "trainable": sum(p.numel() for p in trained),
        "paged": paged,
    }
