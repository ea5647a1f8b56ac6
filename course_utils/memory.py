"""Memory known before the run: predict the bytes of a training step, or measure them.

`estimate_memory` answers from a configuration alone, without weights and without a
GPU; `measure_memory` says what a piece of code really used. GiB = 2**30 bytes.

>>> small = estimate_memory("smollm2-135m", "lora", batch_size=4, sequence_length=128,
...                         dtype="float32", r=8, target_modules="all-linear")
>>> small.static, small.fits("T4")
(577135872, True)
"""

from __future__ import annotations

from typing import Any

from course_utils.memory_answer import PARTS, MemoryEstimate, estimate, unfused
from course_utils.memory_measure import Measurement, measure_memory
from course_utils.memory_request import (
    GIB,
    GPUS,
    KNOWN_MODELS,
    gpu_gib,
    make_request,
    model_config,
)

__all__ = [
    "GIB",
    "GPUS",
    "KNOWN_MODELS",
    "PARTS",
    "Measurement",
    "MemoryEstimate",
    "estimate_memory",
    "gpu_gib",
    "measure_memory",
    "model_config",
    "t4_plan",
]


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
