"""The closed form of a training step's memory: arithmetic on a configuration.

It adds up what a step keeps for the next one (`_static_parts`) and what automatic
differentiation keeps of each decoder layer of the Llama family, as transformers writes
it (`_Layer`), and takes the largest of a few moments (`_moments`). Letters: `B` batch,
`T` sequence, `N` = B T, `d` width, `F` feed-forward width, `V` vocabulary, `H` heads.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from course_utils.parameters import adapter_parameters, skeleton

if TYPE_CHECKING:
    from course_utils.memory.estimate import Request

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
KEPT_PARTS = ("weights", "quantization", "adapters", "gradients", "optimizer")
PARTS = (*KEPT_PARTS, "activations", "logits")
ADAPTER_BYTES = 4  # PEFT keeps what it trains in float32, whatever the base is

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

#: Published configurations: name -> model type, d, F, L, heads, key/value heads, head
#: size, V, positions, tied embeddings. Source: the config.json on each model's page.
KNOWN_MODELS: dict[str, tuple] = {
    "llama-2-7b": ("llama", 4096, 11008, 32, 32, 32, 128, 32000, 4096, False),
    "llama-3.2-1b": ("llama", 2048, 8192, 16, 32, 8, 64, 128256, 131072, True),
    "llama-3.2-3b": ("llama", 3072, 8192, 28, 24, 8, 128, 128256, 131072, True),
    "llama-3.1-8b": ("llama", 4096, 14336, 32, 32, 8, 128, 128256, 131072, False),
    "mistral-7b": ("mistral", 4096, 14336, 32, 32, 8, 128, 32768, 32768, False),
    "qwen2.5-0.5b": ("qwen2", 896, 4864, 24, 14, 2, 64, 151936, 32768, True),
    "qwen2.5-1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 128, 151936, 32768, True),
    "qwen2.5-7b": ("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, 32768, False),
    "smollm2-135m": ("llama", 576, 1536, 30, 9, 3, 64, 49152, 8192, True),
    "smollm2-360m": ("llama", 960, 2560, 32, 15, 5, 64, 49152, 8192, True),
    "smollm2-1.7b": ("llama", 2048, 8192, 24, 32, 32, 64, 49152, 8192, True),
}
_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings"),
    "tie_word_embeddings",
)


def model_config(name: str) -> Any:
    """The `transformers` configuration of a known model, without a network.

    Raises ValueError: a name that is not in `KNOWN_MODELS`.
    """
    if (key := str(name).lower()) not in KNOWN_MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(KNOWN_MODELS)}")
    from transformers import AutoConfig

    model_type, *shape = KNOWN_MODELS[key]
    fields = dict(zip(_FIELDS, shape, strict=True))
    if model_type == "mistral":
        fields["sliding_window"] = None
    return AutoConfig.for_model(model_type, **fields)


def gpu_gib(gpu: str | float) -> float:
    """GiB of tensors to plan for on `gpu` (upper or lower case; a number is GiB).

    Raises ValueError: a card that is not in `GPUS`; the message lists them.
    """
    if isinstance(gpu, int | float):
        return float(gpu)
    for name, gib in GPUS.items():
        if name.lower() == str(gpu).lower():
            return gib
    raise ValueError(f"unknown GPU {gpu!r}; known: {', '.join(GPUS)}")


# --- what is kept from step to step ----------------------------------------------

_FAMILIES = ("llama", "mistral", "qwen2")
#: Where the input of each linear layer comes from.
_SOURCES = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attention")
_SOURCES |= {"o_proj": "heads", "gate_proj": "mlp", "up_proj": "mlp"}
_SOURCES |= {"down_proj": "product"}


def optimizer_state_bytes(
    optimizer: str, elements: int, itemsize: int, *, embedding: bool = False
) -> int:
    """Bytes of optimizer state that one trained tensor keeps on the card.

    PyTorch keeps AdamW's two moments in the dtype of the parameter. bitsandbytes keeps
    one byte for each, and one fp32 scale for 256 elements, but fp32 moments for
    tensors below 4,096 elements and, as transformers' trainer asks of it, for the
    weights of an `embedding`; its paged optimizers put the moments of tensors of at
    least 100,000 elements where the driver can move them to the host.

    >>> optimizer_state_bytes("adamw_8bit", 1_000_000, 4)
    2031256
    """
    moments = {"sgd": 0, "sgd_momentum": 1, "adamw": 2}
    if optimizer in moments:
        return moments[optimizer] * elements * itemsize
    state, scales = 8 * elements, 0
    if optimizer.endswith("8bit") and elements >= 4096 and not embedding:
        state, scales = 2 * elements, 8 * -(-elements // 256)
    if optimizer.startswith("paged") and elements >= 100_000:
        return scales
    return state + scales


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
    nested = ("absmax2", -(-blocks // 256), "float32"), ("code2", 256, "float32")
    return [levels, ("absmax", blocks, "uint8"), *nested, ("offset", 1, "float32")]


@dataclass(frozen=True)
class Shapes:
    """What the formula needs to know of a model and its adapters."""

    parameters: int  # elements of the base model
    packed: Counter  # elements -> number of weights that quantization packs
    trained: Counter  # (elements, is it the embedding) -> number of trained tensors
    ranks: dict[int, dict[str, tuple[int, int]]]  # layer -> {linear: (rank, input)}

    @property
    def linear(self) -> int:
        """Elements of all linear weights of the layers."""
        return sum(size * count for size, count in self.packed.items())

    @property
    def trainable(self) -> int:
        """Elements of all trained tensors."""
        return sum(size * count for (size, _), count in self.trained.items())


def _read_shapes(request: Request) -> Shapes:
    """Read the shapes off a model without weights; a ValueError is `closed_form`'s."""
    config, method = request.config, request.method
    if config.model_type not in _FAMILIES:
        raise _no_form(f"{config.model_type!r}, only for {', '.join(_FAMILIES)}")
    model = skeleton(config)
    packed = Counter(
        module.weight.numel()
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in _SOURCES
    )
    trained: Counter = Counter()
    ranks: dict[int, dict] = {}
    if method == "full":
        table = model.get_input_embeddings().weight
        trained.update((p.numel(), p is table) for p in model.parameters())
    elif method == "lora":
        for layer, name, rank, d_in, d_out in _lora_layers(model, request.peft):
            trained.update([(rank * d_in, False), (rank * d_out, False)])
            ranks.setdefault(layer, {})[name] = rank, d_in
        if 0 not in ranks:  # layers below the first adapted one keep nothing
            raise _no_form("LoRA on the upper layers alone")
    elif method in ("prompt_tuning", "prefix_tuning"):
        if getattr(request.peft, "prefix_projection", False):
            raise _no_form("prefix_projection")
        trained[adapter_parameters(config, request.peft), True] = 1
    else:
        raise _no_form(repr(method))
    return Shapes(sum(p.numel() for p in model.parameters()), packed, trained, ranks)


def _no_form(subject: str) -> ValueError:
    return ValueError(f"no closed form for {subject}: use engine='exact'")


#: LoraConfig's fields that the form knows, or that change no tensor's size.
_LORA_FIELDS = {
    *("r", "rank_pattern", "lora_dropout", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "init_lora_weights", "use_rslora"),
    *("lora_alpha", "alpha_pattern", "fan_in_fan_out", "task_type", "inference_mode"),
    *("base_model_name_or_path", "revision", "peft_version", "auto_mapping"),
}


def _lora_layers(model: Any, peft: Any):
    """Yield (layer index, linear layer's name, rank, input, output width)."""
    from peft import LoraConfig
    from peft.tuners import tuners_utils
    from peft.utils import constants, other

    own, new = vars(peft), vars(LoraConfig())
    if unknown := sorted(k for k in own.keys() - _LORA_FIELDS if own[k] != new.get(k)):
        raise _no_form(", ".join(unknown))
    peft = copy.copy(peft)
    if peft.target_modules is None:
        table = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
        peft.target_modules = table[model.config.model_type]
    peft = tuners_utils._maybe_include_all_linear_layers(peft, model)
    exists = tuners_utils.check_target_module_exists
    modules = dict(model.named_modules())
    paths = [path for path in modules if path and exists(peft, path)]
    for path in paths:
        place = re.search(r"layers\.(\d+)\..*?(\w+)$", path)
        if not place or place[2] not in _SOURCES:
            raise _no_form(f"LoRA on {path}")
        module = modules[path]
        rank = other.get_pattern_key(peft.rank_pattern, path)
        rank = peft.rank_pattern.get(rank, peft.r)
        yield int(place[1]), place[2], rank, module.in_features, module.out_features
    if not paths:
        adapter_parameters(model.config, peft)  # refused, with PEFT's own reason


def _static_parts(request: Request, shapes: Shapes) -> dict[str, int]:
    """Bytes kept from step to step, by kind."""
    w = BYTES[request.dtype]
    a = w if request.method == "full" else ADAPTER_BYTES
    weights, constants = w * shapes.parameters, 0
    if request.quantization:
        weights -= w * shapes.linear
        for size, count in shapes.packed.items():
            weights += count * ((size + 1) // 2)
            for _, length, dtype in quantization_constants(size, request.double_quant):
                constants += count * length * BYTES.get(dtype, 1)
    optimizer = sum(
        count * optimizer_state_bytes(request.optimizer, size, a, embedding=is_table)
        for (size, is_table), count in shapes.trained.items()
    )
    return {
        "weights": weights,
        "quantization": constants,
        "adapters": 0 if request.method == "full" else a * shapes.trainable,
        "gradients": a * shapes.trainable,
        "optimizer": optimizer,
    }


# --- what a step adds ------------------------------------------------------------

TILE_TOKENS, TILE_WORDS = 4096, 32768  # of TRL's chunked loss


class _Layer:
    """Bytes that one decoder layer keeps for the backward pass, and needs in it."""

    def __init__(self, request: Request, ranks: dict[str, tuple[int, int]]):
        config, self.r = request.config, request
        self.w = BYTES[request.dtype]  # weights, and the residual stream
        self.c = BYTES[request.autocast or request.dtype]  # matrix products
        self.full = request.method == "full"
        self.ranks = ranks
        self.K = request.sequence_length + request.virtual_tokens  # keys a query sees
        prefix = request.method == "prefix_tuning"  # its virtual tokens ask nothing
        self.T = request.sequence_length if prefix else self.K
        self.N = request.batch_size * self.T
        self.d, self.F = config.hidden_size, config.intermediate_size
        self.H, self.KV = config.num_attention_heads, config.num_key_value_heads
        self.D = getattr(config, "head_dim", None) or self.d // self.H
        self.masked = request.padding or prefix
        self.scores = request.batch_size * self.H * self.T * self.K

    def norm(self) -> int:
        """RMSNorm: its fp32 input, the scale; the product if its weight is trained."""
        return self.N * (self.d * (4 + self.full * self.w) + 8)

    def attention(self) -> int:
        """The core of attention: q, k, v and what turns scores into an output."""
        B, c = self.r.batch_size, self.c
        heads = self.H if self.masked or self.r.attention != "sdpa" else self.KV
        values = 2 * B * self.K * heads * self.D * c
        queries = self.N * self.H * self.D * c
        if self.r.attention == "eager":  # softmax in fp32, and cast
            return queries + values + self.scores * (4 + (c if c < 4 else 0))
        if self.r.attention == "math":
            return 2 * (queries + values) + 4 * self.scores
        mask = B * self.T * self.K * c if self.masked else 0
        sums = B * self.H * self.T * 4
        return 2 * queries + values + sums + mask  # queries and output

    def inputs(self) -> int:
        """Inputs of linear layers kept for the gradients of trained weights."""
        fused = self.r.attention == "sdpa"  # whose output is kept already
        if self.full:
            casts = 5 if self.w != self.c else 2  # autocast copies for each of q, k..
            out = 0 if fused else self.H * self.D
            return self.N * self.c * (casts * self.d + self.F + out)
        kept, shared = 0, set()
        autocast, a = self.r.autocast, ADAPTER_BYTES
        dropout = getattr(self.r.peft, "lora_dropout", 0)
        for name, (rank, width) in self.ranks.items():
            source = _SOURCES[name]
            x = self.w if source in ("attention", "mlp") else self.c
            if self.r.quantization and autocast:
                size, copied = self.c, x != self.c
            else:
                size = self.c if autocast else a
                copied = x != a or size != a
            kept += self.N * rank * size
            if dropout:
                kept += self.N * width * (1 + size)
            elif copied:
                kept += self.N * width * size
            elif source not in shared:
                shared.add(source)
                if source != "heads" or not fused:
                    kept += self.N * width * size
        return kept

    def saved(self) -> int:
        """All that one layer keeps from its forward to its backward pass."""
        mlp = 3 * self.N * self.F * self.c
        return 2 * self.norm() + self.attention() + self.inputs() + mlp

    def transient(self) -> int:
        """What the backward pass of one layer needs for a moment, above `saved`."""
        c = self.c
        wide = "down_proj" in self.ranks and not self.r.autocast
        gradients = self.N * self.F * (c + (ADAPTER_BYTES if wide else c))
        if self.r.quantization:  # one dequantized weight, before the gradients peak
            gradients = max(gradients, self.F * (self.N + self.d) * c)
        extra = 3 * self.N * self.d * self.w + gradients
        if self.r.attention != "sdpa":
            extra = max(extra, self.scores * (8 + c))
        return extra


def _moments(request: Request, shapes: Shapes, gradients: int) -> dict[str, tuple]:
    """Bytes above weights and optimizer: moment -> (activations, logits, gradients)."""
    config = request.config
    indices = range(config.num_hidden_layers)
    layers = [_Layer(request, shapes.ranks.get(index, {})) for index in indices]
    L, saved = layers[0], [layer.saved() for layer in layers]
    transient = max(layer.transient() for layer in layers)
    table = config.vocab_size * L.d
    copied = L.c if L.w != L.c else 0  # bytes of autocast's copy of a weight's element
    casts = 0 if request.quantization else copied * shapes.linear
    stream = L.N * L.d * L.w
    if request.gradient_checkpointing:
        kept = len(layers) * stream
        again = max(saved) + transient + casts // len(layers)
        first, last = kept + again, stream + again
    else:
        kept = sum(saved) + casts
        first, last = kept + transient, saved[0] + transient
    kept += L.norm() + (L.N * L.d * L.c if L.full else 0) + copied * table
    logits, head = _loss(request, L)
    cache = 0  # prefix tuning works through the cache, alive until there is a loss
    if request.method == "prefix_tuning":
        cache = 2 * request.batch_size * L.K * L.KV * L.D * L.c * len(layers)
    table_gradient = L.w * table if L.full else 0  # the head's, and the embedding's
    moments = {
        "loss": (kept + head + cache, logits, 0),
        "backward": (first + stream + table_gradient, 0, 0),
        "end": (last, 0, gradients),
    }
    if L.full:  # the embedding's gradient comes last; a tied table has two of them
        early = table_gradient if config.tie_word_embeddings else 0
        moments["end"] = (last + early, 0, gradients - table_gradient)
        moments["embedding"] = (stream + 3 * early, 0, gradients - early)
    if request.gradient_accumulation:  # those of an earlier batch are there
        moments = {k: (a, b, gradients) for k, (a, b, _) in moments.items()}
    return moments


def _loss(request: Request, layer: _Layer) -> tuple[int, int]:
    """Bytes of the logits, and what the chunked loss needs beside them."""
    N, d, w, c = layer.N, layer.d, layer.w, layer.c
    V = request.config.vocab_size
    if request.loss == "logits":
        return 12 * N * V, 0
    rows, words = min(N, TILE_TOKENS), min(V, TILE_WORDS)
    head = N * d * (4 + w) + (words * d * c if w != c else 0)
    if layer.full:
        head += (4 + (w if w < 4 else 0)) * V * d
    return rows * words * c, head


def closed_form(request: Request) -> tuple[dict, dict, str, int]:
    """Predict one training step: the fields of `MemoryEstimate` before `request`.

    Raises ValueError: there is no closed form.
    """
    shapes = _read_shapes(request)
    static = _static_parts(request, shapes)
    moments = _moments(request, shapes, static["gradients"])
    moment = max(moments, key=lambda name: sum(moments[name]))
    at_peak = zip(("activations", "logits", "gradients"), moments[moment], strict=True)
    return static | dict(at_peak), static, moment, shapes.trainable
