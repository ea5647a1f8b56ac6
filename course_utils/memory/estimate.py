"""Memory known before the run: predict the bytes of a training step, or measure them.

`estimate_memory` answers from a configuration alone, without weights and without a
GPU; `measure_memory` says what a piece of code really used. GiB = 2**30 bytes.

>>> small = estimate_memory("smollm2-135m", "lora", batch_size=4, sequence_length=128,
...                         dtype="float32", r=8, target_modules="all-linear")
>>> small.static, small.fits("T4")
(577135872, True)
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from course_utils.memory.formula import (
    GIB,
    GPUS,
    KNOWN_MODELS,
    Request,
    gpu_gib,
    make_request,
    model_config,
)
from course_utils.runtime import get_profile, give_back_memory

__all__ = [
    "GIB",
    "GPUS",
    "KNOWN_MODELS",
    "Measurement",
    "MemoryEstimate",
    "PARTS",
    "estimate_memory",
    "gpu_gib",
    "measure_memory",
    "model_config",
    "t4_plan",
]

# --- memory_answer ---
# The answer of `memory.estimate_memory`, and the cheapest change that makes it fit.

PARTS = (
    "weights",
    "quantization",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
)


@dataclass(frozen=True)
class MemoryEstimate:
    """The answer of `estimate_memory`, in bytes.

    Attributes:
        parts: bytes alive at the moment of the peak, by kind, in the order of `PARTS`;
            they add up to `total`. Gradients count here only as far as they exist at
            that moment: at the loss there are none yet, unless they accumulate.
        static_parts: bytes kept from step to step, whatever the batch: weights,
            quantization constants, adapters, gradients, optimizer state.
        moment: when the peak is reached: ``"loss"``, ``"backward"``, ``"end"`` or
            ``"embedding"`` (formula), ``"forward"`` or ``"backward"`` (exact).
        trainable: how many parameters are trained.
        paged: bytes of optimizer state that a paged optimizer leaves to the driver,
            which moves them to the host when the card is full; not in `total`.
        engine: ``"formula"`` or ``"exact"``.
    """

    parts: dict[str, int]
    static_parts: dict[str, int]
    moment: str
    trainable: int
    paged: int
    engine: str
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
        """Peak in GiB."""
        return self.total / GIB

    def fits(self, gpu: str) -> bool:
        """Whether the peak is within what to plan for on `gpu`.

        Raises:
            ValueError: for a card that is not in `GPUS`.
        """
        return self.total <= gpu_gib(gpu) * GIB

    def cheapest_change(self, gpu: str | float) -> tuple[str, MemoryEstimate] | None:
        """The change that makes this run fit `gpu` at the lowest price.

        The prices, from low to high: the chunked loss (the same numbers at the same
        speed), an 8-bit optimizer, a smaller batch with gradient accumulation, gradient
        checkpointing (about a third more time), QLoRA (a rounded base; for full
        fine-tuning, another method). Several changes add their prices.

        Args:
            gpu: a card of `GPUS`, or GiB.

        Returns:
            What to change, and its estimate by the closed form; None where nothing
            fits, or where the model has no closed form.

        Raises:
            ValueError: for a card that is not in `GPUS`.
        """
        limit = gpu_gib(gpu) * GIB
        for _, words, request in sorted(_changes(self.request), key=lambda c: c[0]):
            estimate = _formula_or_none(request)
            if estimate is not None and estimate.total <= limit:
                return " and ".join(words), estimate
        return None

    def verdict(self, gpu: str) -> str:
        """One sentence: does it fit, and if not, what would make it fit.

        Raises:
            ValueError: for a card that is not in `GPUS`.
        """
        numbers = (
            f"{self.total_gib:.1f} GiB needed, {gpu_gib(gpu):.1f} GiB to plan for "
            f"on the {gpu}"
        )
        if self.fits(gpu):
            return f"Fits: {numbers}."
        start = f"Does not fit: {numbers}"
        change = self.cheapest_change(gpu)
        if change is not None:
            words, estimate = change
            return f"{start}; cheapest change: {words} ({estimate.total_gib:.1f} GiB)."
        tried = [_formula_or_none(request) for _, _, request in _changes(self.request)]
        best = min((e.total_gib for e in tried if e is not None), default=None)
        if best is None:
            return f"{start}; the closed form knows no change for this."
        larger = [name for name, gib in GPUS.items() if gib >= best]
        advice = "a smaller model"
        if larger:
            advice += f", or at least the {min(larger, key=GPUS.__getitem__)}"
        return (
            f"{start}; at best {best:.1f} GiB after every change (batch 1, "
            "gradient checkpointing, chunked loss, 8-bit optimizer, QLoRA): "
            f"take {advice}."
        )

    def __str__(self) -> str:
        gib = {name: size / GIB for name, size in self.parts.items()}
        parts = ", ".join(f"{name} {size:.2f}" for name, size in gib.items())
        return f"{self.total_gib:.2f} GiB at the peak ({self.moment}): {parts}"


def _formula_or_none(request: Request) -> MemoryEstimate | None:
    try:
        return estimate(request, "formula")
    except ValueError:
        return None


def unfused(config: Any, method: Any) -> bool:
    """Whether a T4 computes all attention scores where a batch has no padding.

    With grouped-query attention PyTorch has no fused kernel there, unless a mask is
    given (huggingface/transformers#48633).
    """
    heads = getattr(config, "num_attention_heads", None)
    grouped = getattr(config, "num_key_value_heads", None) not in (None, heads)
    return grouped and method != "prefix_tuning"


def _changes(r: Request):
    """Each combination of changes as (price, words, request)."""
    batches, smaller = [(0, None, {})], r.batch_size
    while smaller > 1:
        smaller //= 2
        words = f"batch {smaller} with gradient accumulation"
        new = {"batch_size": smaller, "gradient_accumulation": True}
        if smaller == 1:
            new["padding"] = False
            if (
                r.autocast == "float16"
                and r.attention == "sdpa"
                and unfused(r.config, r.method)
            ):
                new["attention"] = "math"
        batches.append((3 + 0.1 * len(batches), words, new))
    losses, optimizers = [(0, None, {})], [(0, None, {})]
    if r.loss == "logits":
        losses.append((1, "the chunked loss", {"loss": "chunked"}))
    if r.optimizer == "adamw":
        new = {"optimizer": "adamw_8bit"}
        optimizers.append((2, "the 8-bit optimizer", new))
    layers, bases = [(0, None, {})], [(0, None, {})]
    if not r.gradient_checkpointing and r.method != "prefix_tuning":
        new = {"gradient_checkpointing": True}
        layers.append((4, "gradient checkpointing", new))
    if r.method == "full":
        bases.append((16, "QLoRA (r 16, all linear layers)", {"method": "qlora"}))
    elif r.quantization is None:
        name = "QLoRA" if r.method == "lora" else "a 4-bit (NF4) base"
        bases.append((8, name, {"quantization": "nf4"}))
    for chosen in itertools.product(losses, optimizers, batches, layers, bases):
        words = [words for _, words, _ in chosen if words]
        if words:
            new = {k: v for _, _, change in chosen for k, v in change.items()}
            yield sum(price for price, _, _ in chosen), words, _changed(r, new)


def _changed(r: Request, new: dict) -> Request:
    if new.get("method") != "qlora":
        return replace(r, **new)
    lora = make_request(
        r.config,
        "qlora",
        batch_size=r.batch_size,
        sequence_length=r.sequence_length,
        dtype=r.autocast or r.dtype,
        r=16,
        target_modules="all-linear",
    )
    kept = {"loss", "optimizer", "gradient_checkpointing", "attention", "autocast"}
    old = {name: getattr(r, name) for name in kept | {"padding"}}
    return replace(lora, **(old | {k: v for k, v in new.items() if k != "method"}))


def estimate(request: Request, engine: str) -> MemoryEstimate:
    """Answer a checked request.

    Args:
        request: from `make_request`.
        engine: `"formula"` or `"exact"`.

    Raises:
        ValueError: an unknown engine, or no closed form.
    """
    if engine == "formula":
        from course_utils.memory.formula import closed_form as run
    elif engine == "exact":
        from course_utils.memory.dry_run import dry_run as run
    else:
        raise ValueError(f"engine {engine!r} is none of formula, exact")
    answer = run(request)
    found = answer.pop("parts")
    parts = {name: found[name] for name in PARTS if found.get(name)}
    return MemoryEstimate(parts=parts, engine=engine, request=request, **answer)


# --- memory_measure ---
# Measure the peak memory of a piece of code: on a GPU, or in torch's CPU allocator.
#
# `memory.measure_memory` is the public name.

KINDS = ("auto", "cuda", "mps", "allocator", "resident")


@dataclass
class Measurement:
    """Bytes at the start and at the peak; filled in when the `with` block ends.

    Attributes:
        kind: ``"cuda"``, ``"mps"``, ``"allocator"`` or ``"resident"``.
        start_bytes: in use when the block began.
        peak_bytes: the most in use at any moment of the block, start included.
        reserved_bytes: the most that torch had reserved on the card (CUDA only).
    """

    kind: str
    start_bytes: int = 0
    peak_bytes: int = 0
    reserved_bytes: int = 0

    @property
    def added_bytes(self) -> int:
        """Peak above the start."""
        return self.peak_bytes - self.start_bytes

    @property
    def peak_gib(self) -> float:
        """Peak in GiB (2**30 bytes)."""
        return self.peak_bytes / GIB


@contextlib.contextmanager
def measure_memory(kind: str = "auto") -> Iterator[Measurement]:
    """Measure the peak memory of the `with` block.

    Args:
        kind: ``"cuda"``: the allocator's own peak, free of cost. ``"mps"``: what torch
            has allocated on Apple's GPU, which keeps no peak: read every 5 ms, so that
            a shorter one may be missed. ``"allocator"``: on a
            CPU, every allocation that torch makes, recorded by its profiler and added
            up; exact to the byte and comparable with `estimate_memory(...).total`, but
            for a few steps only: the records of one step of a 30-layer model take
            about 80 MB and half a second.
            ``"resident"``: the largest resident size of the process, as Linux keeps it
            (elsewhere read every 5 ms); for runs of any length, but it includes
            Python, the libraries and what the allocator keeps for later.
            ``"auto"``: the first, second or third, whichever fits the device on which
            this run's profile computes.

    Yields:
        A `Measurement`, complete when the block has ended.

    Raises:
        ValueError: for an unknown kind, or that of a GPU which is not there.

    >>> import torch
    >>> with measure_memory("allocator") as used:
    ...     x = torch.ones(1_000_000)
    >>> used.added_bytes // 1000
    4000
    """
    import torch

    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    if kind == "auto":
        device = get_profile().device  # the CPU, if so asked, beside a card too
        kind = device if device in KINDS else "allocator"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("kind 'cuda' needs a CUDA card; on a CPU use 'allocator'")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("kind 'mps' needs Apple's GPU; on a CPU use 'allocator'")
    meters = {"cuda": _cuda, "mps": _mps, "allocator": _allocator}
    result = Measurement(kind)
    with meters.get(kind, _resident)(result):
        yield result


@contextlib.contextmanager
def _cuda(result: Measurement) -> Iterator[None]:
    import torch

    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result.start_bytes = torch.cuda.memory_allocated()
    try:
        yield
    finally:
        torch.cuda.synchronize()
        result.peak_bytes = torch.cuda.max_memory_allocated()
        result.reserved_bytes = torch.cuda.max_memory_reserved()


def live_tensor_bytes() -> int:
    """Bytes of all CPU tensors that Python can reach, each storage once."""
    import torch

    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu":
                    with contextlib.suppress(NotImplementedError, RuntimeError):
                        storage = tensor.untyped_storage()
                        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@contextlib.contextmanager
def _allocator(result: Measurement) -> Iterator[None]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no lines about its own start
    from torch.profiler import ProfilerActivity, profile

    result.start_bytes = live_tensor_bytes()
    recorder = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    recorder.start()
    try:
        yield
    finally:
        recorder.stop()
        events = recorder.profiler.kineto_results.events()
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        now = peak = 0
        for _, size in sorted(changes, key=lambda change: change[0]):
            now += size
            peak = max(peak, now)
        result.peak_bytes = result.start_bytes + peak


@contextlib.contextmanager
def _mps(result: Measurement) -> Iterator[None]:
    import torch

    gc.collect()
    torch.mps.synchronize()
    with _watched(result, torch.mps.current_allocated_memory):
        yield


@contextlib.contextmanager
def _resident(result: Measurement) -> Iterator[None]:
    import psutil

    process = psutil.Process()
    gc.collect()
    give_back_memory()  # blocks kept from before would hide that they are taken again
    exact = _restart_high_water()
    try:
        with _watched(result, lambda: process.memory_info().rss):
            yield
    finally:
        if exact:
            result.peak_bytes = max(result.peak_bytes, _high_water())


@contextlib.contextmanager
def _watched(result: Measurement, in_use: Callable[[], int]) -> Iterator[None]:
    """Let a thread read `in_use` every 5 ms, and keep the most."""
    done = threading.Event()
    result.start_bytes = result.peak_bytes = in_use()

    def look() -> None:
        result.peak_bytes = max(result.peak_bytes, in_use())

    def watch() -> None:
        while not done.wait(0.005):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        look()


def _restart_high_water() -> bool:
    """Let Linux keep the greatest resident size anew (man 5 proc, `clear_refs`).

    Between two looks a thread can miss what a long call takes and frees.

    Returns:
        Whether it does; other systems, and some containers, do not.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _high_water() > 0
    except OSError:
        return False


def _high_water() -> int:
    """The greatest resident size since it was last restarted, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(found[0]) if found else 0


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
    adapter_dtype: Any = "float32",
    autocast: Any = None,
    gradient_accumulation: bool = False,
    padding: bool | None = None,
    **options: Any,
) -> MemoryEstimate:
    """Predict the peak memory of one training step.

    Counted: every tensor that PyTorch allocates. Not counted: the CUDA context, the
    work space of cuBLAS, the allocator's fragmentation and rounding (`GPUS` leaves room
    for them), and what loading takes for a moment. The record `07_card` compares
    predictions with steps on a real card.

    Args:
        config: a `transformers` configuration, or a name in `KNOWN_MODELS`.
        method: ``"full"``, ``"lora"``, ``"qlora"`` (LoRA with ``quantization="nf4"``),
            ``"prompt_tuning"``, ``"prefix_tuning"``, or a PEFT config object.
        batch_size: `B`, examples in one forward pass.
        sequence_length: `T`, tokens of the longest example of the batch.
        dtype: torch dtype, or its name, in which the base model is loaded.
        optimizer: ``"adamw"``, ``"adamw_8bit"``, ``"paged_adamw"``,
            ``"paged_adamw_8bit"``, ``"sgd"``, ``"sgd_momentum"`` (fused, as the
            Trainer's default: the step itself needs no extra memory).
        gradient_checkpointing: keep only the input of each layer, compute the rest
            again.
        engine: ``"formula"`` (milliseconds; Llama, Mistral and Qwen2 models) or
            ``"exact"`` (seconds; a dry run without data, any causal model, any PEFT
            config).
        attention: ``"sdpa"`` (a fused kernel, as on any card of today), ``"math"``
            (what PyTorch falls back to where no fused kernel takes the request, as on
            a T4 with grouped-query attention and no padding mask), or ``"eager"``.
        loss: ``"logits"`` (transformers: all `B x T x V` logits) or ``"chunked"``
            (TRL: never all at once).
        quantization: ``"nf4"`` or ``"fp4"`` for a 4-bit base; None for `dtype`.
        double_quant: quantize the 4-bit constants too.
        adapter_dtype: dtype of the trained adapter; PEFT's own default is float32.
        autocast: dtype of mixed precision (the Trainer's `fp16` or `bf16`), or None.
        gradient_accumulation: gradients of an earlier batch are alive.
        padding: whether the batch holds padding, and attention so needs a mask. None:
            yes for batches of more than one example.
        **options: PEFT's fields and defaults for `method`: ``r``, ``target_modules``,
            ``num_virtual_tokens``, ...

    Raises:
        ValueError: for unknown names, sizes below 1 or beyond the model's positions,
            combinations that cannot be trained, and where there is no closed form.

    Sources: mixed precision, arXiv:1710.03740; gradient checkpointing,
    arXiv:1604.06174; QLoRA, arXiv:2305.14314.
    """
    settings = dict(locals())
    for name in ("config", "method", "engine", "options"):
        settings.pop(name)
    request = make_request(config, method, **settings, **options)
    return estimate(request, engine)


def t4_plan(
    config: Any,
    method: Any,
    *,
    batch_size: int,
    sequence_length: int,
    padding: bool | None = None,
    engine: str = "formula",
    **options: Any,
) -> MemoryEstimate:
    """Predict a run on a T4, with the choices that this card imposes.

    A T4 computes in float16. Full fine-tuning keeps float32 weights under float16
    autocast; adapters are float32 on a float16 base, also under autocast. Where a model
    with grouped-query attention sees no padding, PyTorch has no fused kernel for it
    on this card and computes all scores (huggingface/transformers#48633).

    Args:
        config, method, batch_size, sequence_length, padding, engine: as in
            `estimate_memory`.
        **options: all its other arguments.

    Returns:
        The estimate; `.total_gib` is the number in the README's table, `.fits("T4")`
        and `.verdict("T4")` compare it with 14.0 GiB.

    >>> plan = t4_plan("llama-2-7b", "qlora", batch_size=1, sequence_length=512, r=64,
    ...                target_modules=["q_proj", "v_proj"], gradient_checkpointing=True)
    >>> plan.fits("T4")
    True
    """
    if isinstance(config, str):
        config = model_config(config)
    masked = batch_size != 1 if padding is None else padding
    kind = method if isinstance(method, str) else str(method.peft_type.value).lower()
    chosen = {
        "dtype": "float32" if method == "full" else "float16",
        "autocast": "float16",
        "attention": "math" if not masked and unfused(config, kind) else "sdpa",
    }
    return estimate_memory(
        config,
        method,
        batch_size=batch_size,
        sequence_length=sequence_length,
        padding=padding,
        engine=engine,
        **(chosen | options),
    )
