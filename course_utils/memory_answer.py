"""The answer of `memory.estimate_memory`, and the cheapest change that makes it fit."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

from course_utils.memory_request import GIB, GPUS, Request, gpu_gib, make_request

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
        request: from `memory_request.make_request`.
        engine: `"formula"` or `"exact"`.

    Raises:
        ValueError: an unknown engine, or no closed form.
    """
    if engine == "formula":
        from course_utils.memory_formula import closed_form as run
    elif engine == "exact":
        from course_utils.memory_exact import dry_run as run
    else:
        raise ValueError(f"engine {engine!r} is none of formula, exact")
    answer = run(request)
    found = answer.pop("parts")
    parts = {name: found[name] for name in PARTS if found.get(name)}
    return MemoryEstimate(parts=parts, engine=engine, request=request, **answer)
