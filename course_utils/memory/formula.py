"""The closed form of the memory engine: arithmetic on a configuration, milliseconds.

It adds up what automatic differentiation keeps of each decoder layer of the Llama
family (as transformers writes it), and takes the largest of three moments: the loss,
the first layer that the backward pass reaches, and the last one.

Letters: `B` batch, `T` sequence, `N` = B T tokens, `d` width, `F` feed-forward width,
`V` vocabulary, `L` layers, `H` heads, `r` rank.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from course_utils.parameters import (
    adapter_parameters,
    features,
    peft_config,
    skeleton,
    target_modules,
)

# --- memory_request ---
# What a memory estimate is asked for: models, cards, and a request that makes sense.
#
# Formulas are in `memory_formula`, the dry run in `memory_exact`; the public functions
# in `memory`.

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


# --- memory_static ---
# Bytes that a training step keeps for the next one: weights, adapters, their state.
#
# Shared by both memory engines: what an optimizer keeps, what quantization adds, and
# the shapes of a model and its adapters.

FAMILIES = ("llama", "mistral", "qwen2")
#: Where the input of each linear layer comes from.
SOURCES = {
    "q_proj": "attention",
    "k_proj": "attention",
    "v_proj": "attention",
    "o_proj": "heads",
    "gate_proj": "mlp",
    "up_proj": "mlp",
    "down_proj": "product",
}


def optimizer_state_bytes(
    optimizer: str, elements: int, itemsize: int, *, embedding: bool = False
) -> tuple[int, int]:
    """Bytes of optimizer state for one trained tensor: (kept on the card, paged).

    PyTorch keeps AdamW's two moments in the dtype of the parameter. bitsandbytes keeps
    one byte for each, and one fp32 scale for 256 elements, but fp32 moments for
    tensors below 4,096 elements and, as transformers' trainer asks of it, for the
    weights of an `embedding`; its paged optimizers put the moments of tensors of at
    least 100,000 elements where the driver can move them to the host.

    >>> optimizer_state_bytes("adamw", 1_000_000, 4)
    (8000000, 0)
    >>> optimizer_state_bytes("adamw_8bit", 1_000_000, 4)
    (2031256, 0)
    """
    if optimizer == "sgd":
        return 0, 0
    if optimizer == "sgd_momentum":
        return elements * itemsize, 0
    if optimizer == "adamw":
        return 2 * elements * itemsize, 0
    moments, scales = 8 * elements, 0
    if optimizer.endswith("8bit") and elements >= 4096 and not embedding:
        moments, scales = 2 * elements, 8 * -(-elements // 256)
    if optimizer.startswith("paged") and elements >= 100_000:
        return scales, moments
    return moments + scales, 0


def quantization_constants(elements: int, double_quant: bool) -> list[tuple]:
    """Constants beside one 4-bit weight in blocks of 64: (name, length, dtype).

    One fp32 absmax a block; with double quantization one byte a block and one fp32 for
    256 blocks, a 256-entry code book and an offset. Each weight has its 16 levels.
    QLoRA, arXiv:2305.14314, section 3; layout of bitsandbytes.
    """
    blocks = -(-elements // 64)
    levels = ("levels", 16, "float32")
    if not double_quant:
        return [levels, ("absmax", blocks, "float32")]
    return [
        levels,
        ("absmax", blocks, "uint8"),
        ("absmax2", -(-blocks // 256), "float32"),
        ("code2", 256, "float32"),
        ("offset", 1, "float32"),
    ]


@dataclass(frozen=True)
class Shapes:
    """What the formula needs to know of a model and its adapters.

    Attributes:
        parameters: elements of the base model.
        packed: elements -> number of weights that quantization packs.
        trained: elements -> number of trained tensors.
        ranks: layer index -> {linear layer's name: (rank, input width)}.
        linear: elements of all linear weights of the layers.
        embedding: elements of the embedding that is trained, 0 if none is.
    """

    parameters: int
    packed: Counter
    trained: Counter
    ranks: dict[int, dict[str, tuple[int, int]]]
    linear: int
    embedding: int


def shapes(request: Request) -> Shapes:
    """Read the shapes off a model without weights.

    Raises:
        ValueError: for a model family or an adapter that has no closed form here.
    """
    config, peft = request.config, request.peft
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"no closed form for {config.model_type!r} (there is one for "
            f"{', '.join(FAMILIES)}): use engine='exact'"
        )
    model, embedding = skeleton(config), 0
    packed: Counter = Counter()
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in SOURCES:
            packed[module.weight.numel()] += 1
    trained: Counter = Counter()
    ranks: dict[int, dict] = {}
    if request.method == "full":
        trained.update(p.numel() for p in model.parameters())
        embedding = model.get_input_embeddings().weight.numel()
    elif request.method == "lora":
        odd = [f for f in ("use_dora", "modules_to_save") if getattr(peft, f, None)]
        odd += ["bias"] if peft.bias != "none" else []
        if odd:
            raise ValueError(f"no closed form for {', '.join(odd)}: engine='exact'")
        for name, module in target_modules(model, peft):
            rank = peft.r
            for pattern, value in (peft.rank_pattern or {}).items():
                if re.match(rf"(.*\.)?({pattern})$", name):
                    rank = value
                    break
            d_in, d_out = features(name, module)
            trained.update((rank * d_in, rank * d_out))
            found = re.search(r"layers\.(\d+)\..*?(\w+)$", name)
            if not found or found[2] not in SOURCES:
                raise ValueError(f"no closed form for LoRA on {name}: engine='exact'")
            ranks.setdefault(int(found[1]), {})[found[2]] = (rank, d_in)
    elif request.method in ("prompt_tuning", "prefix_tuning"):
        if getattr(peft, "prefix_projection", False):
            raise ValueError("no closed form for prefix_projection: engine='exact'")
        embedding = adapter_parameters(config, peft)
        trained[embedding] += 1
    else:
        raise ValueError(f"no closed form for {request.method!r}: use engine='exact'")
    parameters = sum(p.numel() for p in model.parameters())
    linear = sum(size * count for size, count in packed.items())
    return Shapes(parameters, packed, trained, ranks, linear, embedding)


def static_parts(request: Request, known: Shapes) -> tuple[dict[str, int], int]:
    """Bytes kept from step to step, by kind, and the bytes of paged optimizer state."""
    w = BYTES[request.dtype]
    a = w if request.method == "full" else BYTES[request.adapter_dtype]
    weights, constants = w * known.parameters, 0
    if request.quantization:
        weights -= w * known.linear
        for size, count in known.packed.items():
            weights += count * ((size + 1) // 2)
            for _, length, dtype in quantization_constants(size, request.double_quant):
                constants += count * length * BYTES.get(dtype, 1)
    trainable = sum(size * count for size, count in known.trained.items())
    kept = paged = 0
    for size, count in known.trained.items():
        one = size == known.embedding  # of these is the embedding
        for times, special in ((count - one, False), (int(one), True)):
            here, there = optimizer_state_bytes(
                request.optimizer, size, a, embedding=special
            )
            kept, paged = kept + times * here, paged + times * there
    adapters = 0 if request.method == "full" else a * trainable
    parts = {
        "weights": weights,
        "quantization": constants,
        "adapters": adapters,
        "gradients": a * trainable,
        "optimizer": kept,
    }
    return parts, paged


TILE_TOKENS, TILE_WORDS = 4096, 32768  # of TRL's chunked loss


class Layer:
    """Bytes that one decoder layer keeps for the backward pass, and needs in it."""

    def __init__(self, request: Request, ranks: dict[str, tuple[int, int]]):
        config, self.r = request.config, request
        self.w = BYTES[request.dtype]  # weights, and the residual stream
        self.c = BYTES[request.autocast or request.dtype]  # matrix products
        self.full = request.method == "full"
        self.ranks = ranks
        virtual = getattr(request.peft, "num_virtual_tokens", None) or 0
        prompt = virtual if request.method == "prompt_tuning" else 0
        prefix = virtual if request.method == "prefix_tuning" else 0
        self.T = request.sequence_length + prompt
        self.K = self.T + prefix  # keys that a query sees
        self.N = request.batch_size * self.T
        self.d, self.F = config.hidden_size, config.intermediate_size
        self.H, self.KV = config.num_attention_heads, config.num_key_value_heads
        self.D = getattr(config, "head_dim", None) or self.d // self.H
        self.masked = request.padding or bool(prefix)

    def norm(self) -> int:
        """RMSNorm: its fp32 input, the scale; the product if its weight is trained."""
        return self.N * (self.d * (4 + self.full * self.w) + 8)

    def attention(self) -> int:
        """The core of attention: q, k, v and what turns scores into an output."""
        B, c = self.r.batch_size, self.c
        wide = self.H if self.masked or self.r.attention != "sdpa" else self.KV
        values = 2 * B * self.K * wide * self.D * c
        queries = self.N * self.H * self.D * c
        scores = B * self.H * self.T * self.K
        if self.r.attention == "eager":  # softmax in fp32, and cast
            return queries + values + scores * (4 + (c if c < 4 else 0))
        if self.r.attention == "math":
            return 2 * (queries + values) + 4 * scores
        mask = B * self.T * self.K * c if self.masked else 0
        sums = B * self.H * self.T * 4
        return 2 * queries + values + sums + mask  # queries and output

    def inputs(self) -> int:
        """Inputs of linear layers kept for the gradients of trained weights."""
        if self.full:
            casts = 5 if self.w != self.c else 2  # autocast copies for each of q, k..
            out = self.N * self.H * self.D * self.c
            return self.N * self.c * (casts * self.d + self.F) + (
                out if self.r.attention != "sdpa" else 0
            )
        kept, shared = 0, set()
        amp, a = self.r.autocast, BYTES[self.r.adapter_dtype]
        dropout = getattr(self.r.peft, "lora_dropout", 0)
        for name, (rank, width) in self.ranks.items():
            source = SOURCES[name]
            x = self.w if source in ("attention", "mlp") else self.c
            if self.r.quantization and amp:
                size, copied = self.c, x != self.c
            else:
                size = self.c if amp else a
                copied = x != a or size != a
            kept += self.N * rank * size
            if dropout:
                kept += self.N * width * (1 + size)
            elif copied:
                kept += self.N * width * size
            elif source not in shared:
                shared.add(source)
                if source != "heads" or self.r.attention != "sdpa":
                    kept += self.N * width * size
        return kept

    def saved(self) -> int:
        """All that one layer keeps from its forward to its backward pass."""
        mlp = 3 * self.N * self.F * self.c
        return 2 * self.norm() + self.attention() + self.inputs() + mlp

    def transient(self) -> int:
        """What the backward pass of one layer needs for a moment, above `saved`."""
        c, wide = self.c, self.c
        if "down_proj" in self.ranks and not self.r.autocast:
            wide = BYTES[self.r.adapter_dtype]
        gradients = self.N * self.F * (c + wide)
        if self.r.quantization:  # one dequantized weight, before the gradients peak
            gradients = max(gradients, self.F * (self.N + self.d) * c)
        extra = 3 * self.N * self.d * self.w + gradients
        if self.r.attention != "sdpa":
            scores = self.r.batch_size * self.H * self.T * self.K
            extra = max(extra, scores * (8 + c))
        return extra


def closed_form(request: Request, known: Shapes | None = None) -> dict[str, Any]:
    """Predict one training step by formula; the same answer as `dry_run`.

    Raises:
        ValueError: where there is no closed form.
    """
    known = known or shapes(request)
    static, paged = static_parts(request, known)
    config = request.config
    kinds = [
        Layer(request, known.ranks.get(i, {})) for i in range(config.num_hidden_layers)
    ]
    one = kinds[0]
    saved = [layer.saved() for layer in kinds]
    full, w, c, N = one.full, one.w, one.c, one.N
    V, d = config.vocab_size, config.hidden_size
    tied = config.tie_word_embeddings
    # autocast copies of fp32 weights
    casts = c * known.linear if w != c and not request.quantization else 0
    stream = N * d * w
    transient = max(layer.transient() for layer in kinds)
    if request.gradient_checkpointing:
        kept = len(kinds) * stream
        first = kept + max(saved) + transient + casts // len(kinds)
        last = stream + max(saved) + transient + casts // len(kinds)
    else:
        kept = sum(saved) + casts
        first = kept + transient
        last = saved[0] + transient
    kept += one.norm() + (N * d * c if full else 0) + (c * V * d if w != c else 0)
    if request.loss == "logits":
        logits, head = 12 * N * V, 0
    else:
        rows, words = min(N, TILE_TOKENS), min(V, TILE_WORDS)
        logits = rows * words * c
        head = N * d * (4 + w) + (words * d * c if w != c else 0)
        head += (4 + (w if w < 4 else 0)) * V * d if full else 0
    cache = 0  # prefix tuning works through the cache, alive until there is a loss
    if request.method == "prefix_tuning":
        keys = request.batch_size * one.K * one.KV * one.D * c
        cache = 2 * keys * len(kinds)
    gradients = static["gradients"]
    head_gradient = w * V * d if full else 0
    # moment: (activations, logits, gradients)
    moments = {
        "loss": (kept + head + cache, logits, 0),
        "backward": (first + stream + head_gradient, 0, 0),
        "end": (last, 0, gradients),
    }
    if full:  # the embedding's gradient comes last; a tied table has two of them
        table = w * V * d
        early = (table if tied else 0, gradients - table)
        moments["end"] = (last + early[0], 0, early[1])
        moments["embedding"] = (
            stream + (3 * table if tied else 0),
            0,
            gradients - (table if tied else 0),
        )
    if request.gradient_accumulation:
        moments = {k: (a, b, gradients) for k, (a, b, _) in moments.items()}
    moment = max(moments, key=lambda name: sum(moments[name]))
    activations, logits, held = moments[moment]
    parts = {k: v for k, v in static.items() if k != "gradients"}
    parts |= {"gradients": held, "activations": activations, "logits": logits}
    return {
        "parts": {k: v for k, v in parts.items() if v},
        "static_parts": static,
        "moment": moment,
        "trainable": sum(size * count for size, count in known.trained.items()),
        "paged": paged,
    }
