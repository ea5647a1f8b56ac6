"""Bytes that a training step keeps for the next one: weights, adapters, their state.

Shared by both memory engines: what an optimizer keeps, what quantization adds, and
the shapes of a model and its adapters.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from course_utils.memory_request import BYTES, Request
from course_utils.parameters import adapter_parameters
from course_utils.targets import features, skeleton, target_modules

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
