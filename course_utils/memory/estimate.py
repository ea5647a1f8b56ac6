"""Memory known before the run: predict the bytes of a training step, or measure them.

GiB = 2**30 bytes.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from course_utils.memory.formula import (
    BYTES,
    GIB,
    GPUS,
    PARTS,
    closed_form,
    gpu_gib,
    model_config,
)
from course_utils.parameters import peft_config
from course_utils.runtime import get_profile

_CHOICES: dict[str, Any] = {
    "dtype": tuple(BYTES),
    "optimizer": (
        *("adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"),
        *("sgd", "sgd_momentum"),
    ),
    "attention": ("sdpa", "math", "eager"),
    "loss": ("logits", "chunked"),
    "quantization": ("nf4", "fp4", None),
    "autocast": ("float16", "bfloat16", None),
}


@dataclass(frozen=True)
class Request:
    """One training step; `estimate_memory` documents the fields and the errors."""

    config: Any
    method: str  # "full", or PEFT's name of the method in lower case
    peft: Any  # the PEFT config, None for full fine-tuning
    batch_size: int
    sequence_length: int
    dtype: str
    optimizer: str
    gradient_checkpointing: bool
    attention: str
    loss: str
    quantization: str | None
    double_quant: bool
    autocast: str | None
    gradient_accumulation: bool
    padding: bool

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                names = ", ".join(map(str, allowed))
                raise ValueError(f"{name} {value!r} is none of {names}")
        for name in ("batch_size", "sequence_length"):
            if not isinstance(size := getattr(self, name), int) or size < 1:
                needed = "must be a whole number of at least 1"
                raise ValueError(f"{name} {needed}, got {size!r}")
        text = self.config.get_text_config()
        limit = getattr(text, "max_position_embeddings", None)
        tokens = self.sequence_length + self.virtual_tokens
        if 0 < (limit or 0) < tokens:
            needed = f"sequence_length and virtual tokens come to {tokens}"
            raise ValueError(f"{needed}: the model has only {limit} positions")
        if self.method == "full" and self.quantization:
            advice = "use method='qlora', or leave quantization out"
            raise ValueError(f"full fine-tuning cannot train 4-bit weights: {advice}")
        # the gradient scaler refuses them
        if self.method == "full" and self.dtype == "float16":
            advice = "use dtype='float32' with autocast='float16', or bfloat16"
            raise ValueError(f"full fine-tuning cannot train fp16 weights: {advice}")
        if self.method == "prefix_tuning" and self.gradient_checkpointing:
            advice = "prefix tuning needs it: gradient_checkpointing=False"
            raise ValueError(f"checkpointing turns off the key/value cache; {advice}")
        targets = str(getattr(self.peft, "target_modules", ""))
        if self.loss == "chunked" and "lm_head" in targets:
            raise ValueError("the chunked loss needs an lm_head without an adapter")

    @property
    def virtual_tokens(self) -> int:
        """Virtual tokens of the prompt methods, 0 for the others."""
        return getattr(self.peft, "num_virtual_tokens", None) or 0


def estimate_memory(
    config: Any,
    method: Any,
    *,
    batch_size: int,
    sequence_length: int,
    dtype: Any,
    optimizer: str = "adamw",
    gradient_checkpointing: bool = False,
    engine: str = "formula",
    attention: str = "sdpa",
    loss: str = "logits",
    quantization: str | None = None,
    double_quant: bool = True,
    autocast: Any = None,
    gradient_accumulation: bool = False,
    padding: bool | None = None,
    **options: Any,
) -> MemoryEstimate:
    """Predict the peak memory of one training step, without weights and without a GPU.

    Counted: every tensor that PyTorch allocates. Not counted: the CUDA context, the
    work space of cuBLAS, the allocator's fragmentation and rounding (`GPUS` leaves room
    for them), and what loading takes for a moment. The record `07_card` compares
    predictions with steps on a real card. Adapters are in float32, as PEFT keeps them.

    Args:
        config: a `transformers` configuration, or a name in `KNOWN_MODELS`.
        method: ``"full"``, a key of `parameters.METHODS` (``"qlora"`` is LoRA with
            ``quantization="nf4"``), or a PEFT config object.
        sequence_length: tokens of the longest example of the batch.
        dtype: torch dtype, or its name, in which the base model is loaded.
        optimizer: adamw, adamw_8bit, paged_adamw, paged_adamw_8bit, sgd, sgd_momentum;
            fused, as the Trainer's default: the step itself needs no extra memory.
        engine: ``"formula"`` (milliseconds; Llama, Mistral and Qwen2 models) or
            ``"exact"`` (seconds; a dry run of any causal model and PEFT config).
        attention: ``"sdpa"`` (fused), ``"math"`` (PyTorch's fallback where no kernel
            is; see `unfused`), or ``"eager"``.
        loss: ``"logits"`` (all `B x T x V`) or ``"chunked"`` (TRL: never all at once).
        quantization: ``"nf4"`` or ``"fp4"`` for a 4-bit base; None for `dtype`.
        double_quant: quantize the 4-bit constants too.
        autocast: dtype of mixed precision (the Trainer's `fp16` or `bf16`), or None.
        gradient_accumulation: gradients of an earlier batch are alive.
        padding: attention needs a mask. None: yes for batches of more than one example.
        **options: PEFT's fields for `method`, with PEFT's defaults.

    Raises:
        ValueError: for unknown names, sizes below 1 or beyond the model's positions,
            combinations that cannot be trained, and where there is no closed form.

    >>> small = estimate_memory("smollm2-135m", "lora", batch_size=4, dtype="float32",
    ...                         sequence_length=128, r=8, target_modules="all-linear")
    >>> small.static, small.fits("T4")
    (577135872, True)
    """
    if method == "qlora" and quantization is None:
        quantization = "nf4"
    name, peft = _method_and_config(method, options)
    request = Request(
        config=model_config(config) if isinstance(config, str) else config,
        method=name,
        peft=peft,
        batch_size=batch_size,
        sequence_length=sequence_length,
        dtype=str(dtype).removeprefix("torch."),
        optimizer=optimizer,
        gradient_checkpointing=gradient_checkpointing,
        attention=attention,
        loss=loss,
        quantization=quantization,
        double_quant=double_quant,
        autocast=autocast and str(autocast).removeprefix("torch."),
        gradient_accumulation=gradient_accumulation,
        padding=batch_size != 1 if padding is None else padding,
    )
    return _predict(request, engine)


def _method_and_config(method: Any, options: dict[str, Any]) -> tuple[str, Any]:
    """PEFT's name of the method, in lower case, and its config, None for full."""
    if method == "full":
        if options:
            raise ValueError(f"full fine-tuning takes no {', '.join(sorted(options))}")
        return method, None
    if isinstance(method, str):
        options = {"task_type": "CAUSAL_LM"} | options
    try:
        config = peft_config(method, **options)
    except TypeError as error:
        raise ValueError(f"{method}: {error}") from error
    return config.peft_type.value.lower(), config


def _predict(request: Request, engine: str) -> MemoryEstimate:
    predict = closed_form
    if engine == "exact":
        from course_utils.memory.dry_run import dry_run as predict
    elif engine != "formula":
        raise ValueError(f"engine {engine!r} is none of formula, exact")
    sizes, static, moment, trainable = predict(request)
    parts = {name: sizes[name] for name in PARTS if sizes.get(name)}
    return MemoryEstimate(parts, static, moment, trainable, request)


def unfused(config: Any, method: Any) -> bool:
    """Whether a T4 computes all attention scores where a batch has no padding.

    With grouped-query attention PyTorch has no fused kernel there, unless a mask is
    given (huggingface/transformers#48633).
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    key_value_heads = getattr(text, "num_key_value_heads", None)
    prefix = "prefix_tuning" in str(getattr(method, "peft_type", method)).lower()
    return key_value_heads not in (None, heads) and not prefix


def t4_plan(
    config: Any, method: Any, *, batch_size: int, sequence_length: int, **options: Any
) -> MemoryEstimate:
    """Predict a run on a T4, with the choices that this card imposes.

    A T4 computes in float16. Full fine-tuning keeps float32 weights under float16
    autocast; adapters are float32 on a float16 base, also under autocast. Attention is
    `"math"` where `unfused` says so. All other arguments are `estimate_memory`'s.
    """
    if isinstance(config, str):
        config = model_config(config)
    padding = options.get("padding")
    masked = batch_size != 1 if padding is None else padding
    size = {"batch_size": batch_size, "sequence_length": sequence_length}
    imposed = {
        "dtype": "float32" if method == "full" else "float16",
        "autocast": "float16",
        "attention": "math" if not masked and unfused(config, method) else "sdpa",
    }
    return estimate_memory(config, method, **(size | imposed | options))


# --- what is answered ------------------------------------------------------------


@dataclass(frozen=True)
class MemoryEstimate:
    """The answer of `estimate_memory`, in bytes.

    `gpu` is a card of `GPUS`, or GiB; its methods raise a ValueError for another card.
    """

    # alive at the peak, by kind, in the order of `PARTS`; they add up to `total`.
    # Gradients only as far as they exist then: at the loss, none but accumulated ones.
    parts: dict[str, int]
    static_parts: dict[str, int]  # kept from step to step, whatever the batch
    moment: str  # of the peak: loss, backward, end, embedding; exact: forward, backward
    trainable: int  # parameters that are trained
    request: Request = field(repr=False)

    @property
    def static(self) -> int:
        """Weights, constants, adapters, gradients and optimizer state, in bytes."""
        return sum(self.static_parts.values())

    @property
    def total(self) -> int:
        """Peak of one training step, in bytes."""
        return sum(self.parts.values())

    @property
    def total_gib(self) -> float:
        return self.total / GIB

    def fits(self, gpu: str | float) -> bool:
        """Whether the peak is within what to plan for on `gpu`."""
        return self.total <= gpu_gib(gpu) * GIB

    def cheapest_change(self, gpu: str | float) -> tuple[str, MemoryEstimate] | None:
        """The change that makes this run fit `gpu` at the lowest price, in words.

        The prices, from low to high: the chunked loss (the same numbers at the same
        speed), an 8-bit optimizer, a smaller batch with gradient accumulation, gradient
        checkpointing (about a third more time), QLoRA (a rounded base; for full
        fine-tuning, another method). Several changes add their prices. None where
        nothing fits, or where the model has no closed form.
        """
        gib, changed = gpu_gib(gpu), _changed(self.request)
        return next((change for change in changed if change[1].fits(gib)), None)

    def verdict(self, gpu: str) -> str:
        """One sentence: does it fit, and if not, what would make it fit."""
        room = f"{gpu_gib(gpu):.1f} GiB to plan for on the {gpu}"
        numbers = f"{self.total_gib:.1f} GiB needed, {room}"
        if self.fits(gpu):
            return f"Fits: {numbers}."
        start, best = f"Does not fit: {numbers}", math.inf
        for words, estimate in _changed(self.request):
            gib = estimate.total_gib
            if estimate.fits(gpu):
                return f"{start}; cheapest change: {words} ({gib:.1f} GiB)."
            best = min(best, gib)
        if best == math.inf:
            return f"{start}; the closed form knows no change for this."
        larger = [name for name, gib in GPUS.items() if gib >= best]
        advice = "a smaller model"
        if larger:
            advice += f", or at least the {min(larger, key=GPUS.__getitem__)}"
        return (
            f"{start}; at best {best:.1f} GiB after every change (batch 1, gradient "
            f"checkpointing, chunked loss, 8-bit optimizer, QLoRA): take {advice}."
        )

    def __str__(self) -> str:
        parts = ", ".join(f"{k} {size / GIB:.2f}" for k, size in self.parts.items())
        return f"{self.total_gib:.2f} GiB at the peak ({self.moment}): {parts}"


_Change = tuple[float, str, dict[str, Any]]  # price, words, new fields of a request


def _changed(request: Request) -> Iterator[tuple[str, MemoryEstimate]]:
    """Estimate the request under each combination of changes, the cheapest first."""
    choices = [[None, *changes] for changes in _possible_changes(request)]
    combinations = [list(filter(None, row)) for row in itertools.product(*choices)]
    combinations.sort(key=lambda changes: sum(price for price, _, _ in changes))
    for changes in combinations[1:]:  # the first changes nothing
        fields = {name: value for *_, new in changes for name, value in new.items()}
        try:
            estimate = _predict(replace(request, **fields), "formula")
        except ValueError:  # it cannot be trained, or has no closed form
            continue
        yield " and ".join(words for _, words, _ in changes), estimate


def _possible_changes(r: Request) -> list[list[_Change]]:
    """The changes by kind; each kind has one price, or several for smaller batches."""
    kinds = []
    if r.loss == "logits":
        kinds.append([(1, "the chunked loss", {"loss": "chunked"})])
    if r.optimizer == "adamw":
        kinds.append([(2, "the 8-bit optimizer", {"optimizer": "adamw_8bit"})])
    kinds.append(_smaller_batches(r))
    if not r.gradient_checkpointing and r.method != "prefix_tuning":
        kinds.append([(4, "gradient checkpointing", {"gradient_checkpointing": True})])
    fields = {"quantization": "nf4"}
    if r.method == "full":
        adapters = {"r": 16, "target_modules": "all-linear"}
        fields["method"], fields["peft"] = _method_and_config("qlora", adapters)
        fields["dtype"] = r.autocast or r.dtype
        kinds.append([(16, "QLoRA (r 16, all linear layers)", fields)])
    elif r.quantization is None:
        words = "QLoRA" if r.method == "lora" else "a 4-bit (NF4) base"
        kinds.append([(8, words, fields)])
    return kinds


def _smaller_batches(r: Request) -> list[_Change]:
    changes, size = [], r.batch_size
    while (size := size // 2) > 0:
        fields = {"batch_size": size, "gradient_accumulation": True}
        if size == 1:
            fields["padding"] = False
            on_t4 = r.autocast == "float16" and r.attention == "sdpa"
            if on_t4 and unfused(r.config, r.method):
                fields["attention"] = "math"
        price = 3 + 0.1 * (len(changes) + 1)
        changes.append((price, f"batch {size} with gradient accumulation", fields))
    return changes


# --- what is measured ------------------------------------------------------------


@dataclass
class Measurement:
    """Bytes at the start and at the peak; filled in when the `with` block ends."""

    kind: str  # "cuda", "mps" or "allocator"
    start_bytes: int = 0  # in use when the block began
    peak_bytes: int = 0  # the most in use at any moment of the block, start included
    reserved_bytes: int = 0  # the most that torch had reserved on the card (CUDA only)

    @property
    def added_bytes(self) -> int:
        """Peak above the start."""
        return self.peak_bytes - self.start_bytes

    @property
    def peak_gib(self) -> float:
        return self.peak_bytes / GIB


@contextlib.contextmanager
def measure_memory(kind: str = "auto") -> Iterator[Measurement]:
    """Measure the peak memory of the `with` block.

    ``"cuda"``: the allocator's own peak, free of cost. ``"mps"``: Apple's GPU keeps no
    peak, so it is by how much torch's pool there grew, to blocks of some MiB.
    ``"allocator"``: on a CPU, every allocation that torch makes, recorded by its
    profiler: exact to the byte, as `estimate_memory(...).total`, but for a few steps
    only (80 MB and half a second for one of a 30-layer model). ``"auto"``: whichever
    fits the device of this run's profile.
    Raises ValueError: an unknown kind, or that of a GPU which is not there.

    >>> import torch
    >>> with measure_memory("allocator") as used:
    ...     x = torch.ones(1_000_000)
    >>> used.added_bytes // 1000
    4000
    """
    import torch

    meters = {"cuda": _cuda, "mps": _mps, "allocator": _allocator}
    if kind not in ("auto", *meters):
        raise ValueError(f"kind {kind!r} is none of auto, {', '.join(meters)}")
    if kind == "auto":
        device = get_profile().device  # the CPU, if so asked, beside a card too
        kind = device if device in meters else "allocator"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("kind 'cuda' needs a CUDA card; on a CPU use 'allocator'")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("kind 'mps' needs Apple's GPU; on a CPU use 'allocator'")
    gc.collect()
    result = Measurement(kind)
    meter = meters[kind](result)
    next(meter)
    try:
        yield result
    finally:
        next(meter, None)


def _cuda(result: Measurement) -> Iterator[None]:
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result.start_bytes = torch.cuda.memory_allocated()
    yield
    torch.cuda.synchronize()
    result.peak_bytes = torch.cuda.max_memory_allocated()
    result.reserved_bytes = torch.cuda.max_memory_reserved()


def _live_tensor_bytes() -> int:
    """Bytes of all CPU tensors that Python can reach, each storage once."""
    import torch

    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    tensors += [t.grad for t in tensors if t.is_leaf and t.grad is not None]
    storages = {}
    for tensor in tensors:
        if tensor.device.type == "cpu":
            with contextlib.suppress(NotImplementedError, RuntimeError):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _allocator(result: Measurement) -> Iterator[None]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no lines about its own start
    from torch.profiler import ProfilerActivity, profile

    result.start_bytes = _live_tensor_bytes()
    recorder = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    recorder.start()
    yield
    recorder.stop()
    events = recorder.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    sizes = (event.nbytes() for event in changes)
    result.peak_bytes = max(itertools.accumulate(sizes, initial=result.start_bytes))


def _mps(result: Measurement) -> Iterator[None]:
    import torch

    torch.mps.synchronize()
    torch.mps.empty_cache()  # else the pool has room, and would not grow
    result.start_bytes = torch.mps.current_allocated_memory()
    pool_bytes = torch.mps.driver_allocated_memory()
    yield
    torch.mps.synchronize()
    grown = torch.mps.driver_allocated_memory() - pool_bytes
    result.peak_bytes = result.start_bytes + max(grown, 0)
