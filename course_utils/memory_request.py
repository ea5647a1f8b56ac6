"""What a memory estimate is asked for: models, cards, and a request that makes sense.

Formulas are in `memory_formula`, the dry run in `memory_exact`; the public functions
in `memory`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from course_utils.targets import peft_config

GIB = 2**30

#: GiB of tensors to plan for on each card: what the driver leaves of the label, less
#: about 0.6 GiB for the CUDA context and for fragmentation. The T4's 14.0 is the
#: course's one constant (15,360 MiB on the label, 14.56-14.74 GiB reported by torch).
GPUS: dict[str, float] = {
    "T4": 14.0,
    "P100": 15.2,
    "V100": 15.1,
    "L4": 21.4,
    "A10G": 21.4,
    "A100-40": 38.8,
    "A100-80": 78.5,
    "H100": 78.5,
    "RTX 3060": 11.1,
    "RTX 3090": 23.0,
    "RTX 4090": 23.0,
}

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

METHODS = ("full", "lora", "qlora", "prompt_tuning", "prefix_tuning")
#: Optimizer -> (bytes of state per trained parameter, or None = twice its dtype).
OPTIMIZERS = (
    "adamw",
    "adamw_8bit",
    "paged_adamw",
    "paged_adamw_8bit",
    "sgd",
    "sgd_momentum",
)
ATTENTIONS = ("sdpa", "math", "eager")
LOSSES = ("logits", "chunked")
QUANTIZATIONS = ("nf4", "fp4")

#: Published configurations, as data: (model_type, fields). Sources: each model's
#: config.json on its model page.
KNOWN_MODELS: dict[str, tuple[str, dict[str, Any]]] = {}


def _known(name: str, kind: str, shape: tuple, positions: int, tied: bool, **more):
    """Add a model; shape = (d, FFN, L, heads, key/value heads, head size, V)."""
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
    )
    fields = dict(zip(names, shape, strict=True))
    fields |= {"max_position_embeddings": positions, "tie_word_embeddings": tied}
    KNOWN_MODELS[name] = (kind, fields | more)


_known("llama-2-7b", "llama", (4096, 11008, 32, 32, 32, 128, 32000), 4096, False)
_known("llama-3.2-1b", "llama", (2048, 8192, 16, 32, 8, 64, 128256), 131072, True)
_known("llama-3.2-3b", "llama", (3072, 8192, 28, 24, 8, 128, 128256), 131072, True)
_known("llama-3.1-8b", "llama", (4096, 14336, 32, 32, 8, 128, 128256), 131072, False)
_known(
    "mistral-7b",
    "mistral",
    (4096, 14336, 32, 32, 8, 128, 32768),
    32768,
    False,
    sliding_window=None,
)
_known("qwen2.5-0.5b", "qwen2", (896, 4864, 24, 14, 2, 64, 151936), 32768, True)
_known("qwen2.5-1.5b", "qwen2", (1536, 8960, 28, 12, 2, 128, 151936), 32768, True)
_known("qwen2.5-7b", "qwen2", (3584, 18944, 28, 28, 4, 128, 152064), 32768, False)
_known("smollm2-135m", "llama", (576, 1536, 30, 9, 3, 64, 49152), 8192, True)
_known("smollm2-360m", "llama", (960, 2560, 32, 15, 5, 64, 49152), 8192, True)
_known("smollm2-1.7b", "llama", (2048, 8192, 24, 32, 32, 64, 49152), 8192, True)


def model_config(name: str) -> Any:
    """The `transformers` configuration of a known model, without a network.

    Args:
        name: a key of `KNOWN_MODELS`, such as ``"llama-2-7b"``.

    Raises:
        ValueError: for a name that is not in `KNOWN_MODELS`.

    >>> model_config("smollm2-135m").hidden_size
    576
    """
    key = str(name).lower()
    if key not in KNOWN_MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(KNOWN_MODELS)}")
    from transformers import AutoConfig

    kind, fields = KNOWN_MODELS[key]
    return AutoConfig.for_model(kind, **fields)


def gpu_gib(gpu: str | float) -> float:
    """GiB of tensors to plan for on `gpu` (upper or lower case; a number is GiB).

    Raises:
        ValueError: for a card that is not in `GPUS`; the message lists them.

    >>> gpu_gib("t4")
    14.0
    """
    if isinstance(gpu, int | float):
        return float(gpu)
    known = {name.lower(): gib for name, gib in GPUS.items()}
    if str(gpu).lower() not in known:
        raise ValueError(f"unknown GPU {gpu!r}; known: {', '.join(GPUS)}")
    return known[str(gpu).lower()]


def dtype_name(dtype: Any) -> str:
    """``"float32"``, ``"bfloat16"`` or ``"float16"`` from a torch dtype or a string.

    Raises:
        ValueError: for any other dtype.

    >>> dtype_name("bf16")
    'bfloat16'
    """
    name = str(dtype).removeprefix("torch.")
    name = _DTYPE_NAMES.get(name, name)
    if name not in BYTES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(BYTES)}")
    return name


@dataclass(frozen=True)
class Request:
    """A checked request; see `memory.estimate_memory` for the meaning of the fields."""

    config: Any
    method: str
    batch_size: int
    sequence_length: int
    dtype: str
    peft: Any = None
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    attention: str = "sdpa"
    loss: str = "logits"
    quantization: str | None = None
    double_quant: bool = True
    adapter_dtype: str = "float32"
    autocast: str | None = None
    gradient_accumulation: bool = False
    padding: bool = True
    options: dict = field(default_factory=dict)


def _choice(what: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{what} {value!r} is none of {', '.join(map(str, allowed))}")


def _whole(what: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{what} must be a whole number of at least 1, got {value!r}")
    return value


def _adapter(method: str, options: dict) -> Any:
    if method != "lora" and not options.get("num_virtual_tokens"):
        raise ValueError(f"{method} needs num_virtual_tokens=<a number>")
    try:
        return peft_config(method, **({"task_type": "CAUSAL_LM"} | options))
    except TypeError as error:
        raise ValueError(f"{method}: {error}") from error


def make_request(
    config: Any,
    method: Any,
    *,
    batch_size: int,
    sequence_length: int,
    dtype: Any,
    **rest: Any,
) -> Request:
    """Check a request and fill in what depends on something else.

    Args:
        config: a transformers configuration, or a name in `KNOWN_MODELS`.
        method: a name in `METHODS`, or a PEFT config.
        batch_size: examples in one forward pass.
        sequence_length: tokens of the longest of them.
        dtype: of the base model.
        **rest: the other fields of `Request`, and PEFT's own for `method`.

    Raises:
        ValueError: unknown names, sizes below 1 or beyond the model's positions, and
            combinations that no library trains.
    """
    if isinstance(config, str):
        config = model_config(config)
    names = {f for f in Request.__dataclass_fields__ if f not in ("peft", "options")}
    options = {k: rest.pop(k) for k in list(rest) if k not in names}
    values = {k: v for k, v in rest.items() if v is not None}
    values.setdefault("padding", batch_size != 1)
    peft = None
    if not isinstance(method, str):
        peft, method = method, str(method.peft_type.value).lower()
        if options:
            raise ValueError(f"{sorted(options)} belong in the PEFT config itself")
    else:
        _choice("method", method, METHODS)
    if method == "qlora":
        method = "lora"
        values.setdefault("quantization", "nf4")
    if method == "full" and options:
        raise ValueError(f"full fine-tuning takes no {', '.join(sorted(options))}")
    for what in ("dtype", "adapter_dtype", "autocast"):
        if what == "dtype":
            dtype = dtype_name(dtype)
        elif what in values:
            values[what] = dtype_name(values[what])
    request = Request(
        config=config,
        method=method,
        batch_size=_whole("batch_size", batch_size),
        sequence_length=_whole("sequence_length", sequence_length),
        dtype=dtype,
        peft=peft,
        options=options,
        **values,
    )
    _check(request)
    if peft is None and method != "full":
        object.__setattr__(request, "peft", _adapter(method, options))
    _check_adapter(request)
    return request


def _check(r: Request) -> None:
    _choice("optimizer", r.optimizer, OPTIMIZERS)
    _choice("attention", r.attention, ATTENTIONS)
    _choice("loss", r.loss, LOSSES)
    if r.quantization is not None:
        _choice("quantization", r.quantization, QUANTIZATIONS)
    if r.autocast == "float32":
        raise ValueError("autocast is float16 or bfloat16; None means no autocast")
    if r.method == "full":
        if r.quantization:
            raise ValueError(
                "full fine-tuning cannot train 4-bit weights: use method='qlora', "
                "or leave quantization out"
            )
        if r.dtype == "float16":
            raise ValueError(
                "full fine-tuning cannot train fp16 weights (the gradient scaler "
                "refuses them): dtype='float32' with autocast='float16', or bfloat16"
            )
    elif r.adapter_dtype == "float16" or (
        r.autocast == "float16" and r.adapter_dtype == "bfloat16"
    ):
        raise ValueError(
            f"{r.adapter_dtype} adapters cannot be trained under an fp16 gradient "
            "scaler: keep adapter_dtype='float32'"
        )
    if r.method == "prefix_tuning" and r.gradient_checkpointing:
        raise ValueError(
            "prefix tuning works through the key/value cache, which gradient "
            "checkpointing turns off: gradient_checkpointing=False"
        )


def _check_adapter(r: Request) -> None:
    if r.loss == "chunked" and "lm_head" in str(getattr(r.peft, "target_modules", "")):
        raise ValueError("the chunked loss needs an lm_head without an adapter")
    limit = getattr(r.config, "max_position_embeddings", None)
    virtual = getattr(r.peft, "num_virtual_tokens", None) or 0
    if limit and r.sequence_length + virtual > limit:
        more = f" and {virtual} virtual tokens" if virtual else ""
        raise ValueError(
            f"sequence_length {r.sequence_length}{more}: the model has only "
            f"{limit} positions"
        )
