"""Why the course's runs are fast on a CPU: the same loss and gradients, less work.

No logits where nothing is learned; examples side by side in fewer rows, without
padding, and what they all begin with read once a row; plain attention instead of the
fused kernel, whose backward pass is slow for short sequences on a CPU; and no cast of
a LoRA layer's input to float32 that autocast would undo. Where asked for, products in
int8 as well: then the loss is near, not the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from functools import cache
from itertools import takewhile
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

from course_utils.formatting import IGNORE, pack_examples
from course_utils.inference import (
    base_model,
    decodes,
    inference_state,
    mixing_adapter,
    read_virtual_tokens,
    router_configs,
)

if TYPE_CHECKING:
    import torch

# By model and by the attention it was asked with: what `_keeps_packed_apart` found.
_KEPT_APART: WeakKeyDictionary[Any, dict] = WeakKeyDictionary()
WIDEST = 256  # tokens, unless an example is longer: attention costs their square
INT8_AT_LEAST = 64  # rows and columns: smaller matrices, as adapters, stay exact
SHARED_AT_LEAST = 8  # tokens: fewer are not worth a mask of their own


def completion_loss(
    model: Any,
    batch: Mapping[str, torch.Tensor],
    learned_tokens: Any = None,
    router_weight: float | None = None,
) -> torch.Tensor:
    """Cross-entropy of the learned tokens, from logits at those positions only.

    Position t predicts label t + 1. Hidden states whose label is -100 never meet the
    output layer, the largest matrix of a small model.

    Args:
        batch: ``input_ids``, ``labels`` (B, T) and what else the model takes.
        learned_tokens: divides the sum: the learned tokens in all batches of an
            optimiser step. None takes this batch's own: a mean, in nats a token, or 0.
        router_weight: of the loss that balances a mixture of experts, where the model
            is asked for it (`output_router_logits`); None takes the model's own.

    Raises ValueError: the batch is packed, and the model would not tell examples apart.
    """
    from torch.nn.functional import cross_entropy

    if "position_ids" in batch and "attention_mask" not in batch:
        refuse_packed(model)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"][:, 1:]
    learned = labels != IGNORE
    network, mask = model, batch.get("attention_mask")
    if mask is not None and mask.dim() == 4 and virtual_tokens(model):
        network, inputs = _after_virtual_tokens(model, inputs)
    with _only_these_positions(model.get_output_embeddings(), learned):
        output = network(**inputs | {"use_cache": False})
    logits = output.logits.float()  # (learned, V)
    total = cross_entropy(logits, labels[learned].to(logits.device), reduction="sum")
    count = learned.sum().clamp(min=1) if learned_tokens is None else learned_tokens
    balance = getattr(output, "aux_loss", None)
    if balance is None:
        return total / count
    if router_weight is None:
        places = base_model(model), model.config.get_text_config()
        names = "router_aux_loss_coef", "aux_loss_coef"  # JetMoe's is the second
        known = [getattr(place, name, None) for place in places for name in names]
        router_weight = next((weight for weight in known if weight is not None), 0.0)
    return total / count + router_weight * balance


def _after_virtual_tokens(
    model: Any, inputs: Mapping[str, torch.Tensor]
) -> tuple[Any, dict[str, Any]]:
    """What to call, and its inputs: rows of `without_padding` behind virtual tokens."""
    from torch.nn.functional import pad

    network, cache = read_virtual_tokens(model)
    virtual = cache.get_seq_length()
    cache.batch_repeat_interleave(len(inputs["input_ids"]))
    return network, {
        "input_ids": inputs["input_ids"],
        "position_ids": inputs["position_ids"] + virtual,
        "attention_mask": pad(inputs["attention_mask"], (virtual, 0)),  # 0: is seen
        "past_key_values": cache,
    }


@contextmanager
def _only_these_positions(head: Any, learned: torch.Tensor) -> Iterator[None]:
    """While inside, `head` sees the hidden states (B, T, d) of learned positions only.

    The mask (B, T - 1) counts from the end: virtual tokens stand in front.
    """

    def select(module: Any, args: tuple) -> tuple:
        hidden, width = args[0], learned.shape[1]
        return (hidden[:, -width - 1 : -1][learned.to(hidden.device)],)

    with head.register_forward_pre_hook(select):
        yield


def refuse_packed(model: Any) -> None:
    """Raise a ValueError if a model would not keep the examples of a row apart."""
    if virtual_tokens(model):
        why = "virtual tokens do not go together: one prompt would stand before the row"
    elif not _keeps_packed_apart(model):
        kind = mixing_adapter(model) or type(base_model(model)).__name__
        why = f"{kind} do not go together: an example would read others"
    else:
        return
    raise ValueError(
        f"packed examples and {why}. Let CompletionCollator pad one example a row: "
        "leave pack_examples out, and the trainer's packing and padding_free."
    )


def virtual_tokens(model: Any) -> int:
    """How many virtual tokens adapters put before each row, at most."""
    configs = getattr(model, "peft_config", {}).values()
    counts = [c.num_virtual_tokens for c in configs if c.is_prompt_learning]
    return max(counts, default=0)


def _keeps_packed_apart(model: Any) -> bool:
    """Whether examples side by side, each with positions from 0, are read as if alone.

    The model itself is asked, once for each kind of attention, with two examples of
    eight tokens. The second's logits have no gradient at all at what was read of the
    first, and are near those that it gets alone: 30 layers in bfloat16 differ by 6 %.
    """
    if mixing_adapter(model):
        return False
    base = base_model(model)
    answers = _KEPT_APART.setdefault(base, {})
    attention = getattr(base.config, "_attn_implementation", None)
    if attention not in answers:
        answers[attention] = False
        with suppress(Exception):  # its own code's: it takes no positions, say
            answers[attention] = _read_apart(base)
    return answers[attention]


def _read_apart(model: Any, size: int = 8) -> bool:
    import torch

    table, read = model.get_input_embeddings(), []

    def watch(module: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
        read.append(output.detach().requires_grad_())
        return read[-1].clone()  # some models scale it in place

    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        inference_state(model),
        table.register_forward_hook(watch),
    ):
        ids = torch.arange(2 * size, device=table.weight.device)[None]
        positions = ids[:, :size].repeat(1, 2)
        packed, alone = (
            model(input_ids=i, position_ids=p, use_cache=False).logits[0, -size:]
            for i, p in ((ids, positions), (ids[:, size:], positions[:, size:]))
        )
        [gradient] = torch.autograd.grad(packed.float().norm(), read[0])
    apart = not gradient[:, :size].any() and gradient[:, size:].any()
    return bool(apart and (packed - alone).norm() < 0.25 * alone.norm())


def without_padding(
    model: Any, batch: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """The same examples in fewer rows, side by side, each seeing itself alone.

    A beginning that all examples share, such as a default system turn, has the same
    states in each, in a causal model: a row reads it once, and a batch its virtual
    tokens. The loss and its gradients stay the same up to rounding (but an adapter's
    dropout is drawn once a row for it).

    Returns:
        ``input_ids``, ``labels``, ``position_ids`` (rows, T), and with a beginning
        read once a row, or virtual tokens (which neither T nor positions count),
        ``attention_mask`` (rows, 1, T, T), added to attention scores.
        The batch as it is, (B, T), where it cannot be packed or nothing is gained.
    """
    if not _can_be_packed(model, batch):
        return batch
    mask = batch["attention_mask"].bool()
    examples = [
        {name: batch[name][i][mask[i]].tolist() for name in ("input_ids", "labels")}
        for i in range(len(mask))
    ]
    shared = shared_beginning(examples)
    virtual = bool(virtual_tokens(model))
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(text, "sliding_window", None):
        if virtual:  # our mask would replace that of a window, or of chunks
            return batch
        shared = 0
    elif shared < SHARED_AT_LEAST and not virtual:
        shared = 0
    beginning = examples[0]["input_ids"][:shared]
    rest = [{k: values[shared:] for k, values in row.items()} for row in examples]
    width, rows = _fewest_positions(rest, shared)
    if len(rows) * (shared + width) >= mask.numel():
        return batch
    dtype = model.get_input_embeddings().weight.dtype
    packed = _rows_after(beginning, rows, width, dtype, virtual)
    device = batch["input_ids"].device
    return {name: values.to(device) for name, values in packed.items()}


def _can_be_packed(model: Any, batch: Mapping[str, torch.Tensor]) -> bool:
    return (
        set(batch) == {"input_ids", "labels", "attention_mask"}
        and (not virtual_tokens(model) or decodes(model) and not _checkpointed(model))
        and not router_configs(model)
        and not hasattr(model.get_input_embeddings(), "neftune_noise_alpha")
        and bool(batch["attention_mask"].any(dim=1).all())
        and not _draws(model.config.get_text_config())
        and _keeps_packed_apart(model)
    )


def _draws(config: Any) -> bool:
    """Whether the model's own code draws in training, and otherwise in other rows."""
    fields = [v for k, v in vars(config).items() if "drop" in k or "jitter" in k]
    return any(isinstance(value, float) and value > 0 for value in fields)


def _fewest_positions(
    examples: Sequence[Mapping[str, Sequence[int]]], shared: int
) -> tuple[int, list[dict[str, list[int]]]]:
    """The width of rows that leaves fewest positions to compute, and those rows."""
    lengths = [len(example["input_ids"]) for example in examples]
    longest = max(lengths)
    widest = max(longest, min(WIDEST - shared, sum(lengths)))
    widths = range(longest, widest + 1, 8)
    packings = ((width, pack_examples(examples, width)) for width in widths)
    return min(packings, key=lambda pair: (shared + pair[0]) * len(pair[1]))


def _rows_after(
    beginning: list[int],
    rows: Sequence[Mapping[str, list[int]]],
    width: int,
    dtype: torch.dtype,
    masked: bool,
) -> dict[str, torch.Tensor]:
    """Rows filled up to `width`, behind a beginning of P tokens: (rows, P + width).

    What fills a row up is a document of its own. The mask, where there is a beginning
    or it is asked for, lets each example see that and itself.
    """
    import torch

    shared = len(beginning)
    columns: dict[str, list] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        extra = width - len(row["input_ids"])
        places = [shared + p for p in (*row["position_ids"], *range(extra))]
        columns["input_ids"].append(beginning + row["input_ids"] + [0] * extra)
        columns["labels"].append([IGNORE] * shared + row["labels"] + [IGNORE] * extra)
        columns["position_ids"].append([*range(shared), *places])
    packed = {name: torch.tensor(values) for name, values in columns.items()}
    if shared or masked:
        # Each example begins at position `shared`; it has a number, the beginning 0.
        owner = (packed["position_ids"] == shared).cumsum(dim=1)
        seen = (owner[:, None, :] == owner[:, :, None]) | (owner[:, None, :] == 0)
        hidden = torch.full(seen.shape, -torch.inf, dtype=dtype)
        packed["attention_mask"] = hidden.masked_fill(seen.tril(), 0)[:, None]
    return packed


def shared_beginning(examples: Sequence[Mapping[str, Sequence[int]]]) -> int:
    """How many tokens all examples begin with and none of them learns from.

    It ends one token before the first learned one, which its last place predicts.

    >>> row = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, -100, 8]}
    >>> shared_beginning([row, row | {"input_ids": [5, 6, 9, 8]}])
    2
    """
    if len(examples) < 2:
        return 0
    columns = zip(*(row["input_ids"] for row in examples), strict=False)
    same = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, columns))
    unlearned = (
        sum(1 for _ in takewhile(lambda label: label == IGNORE, row["labels"]))
        for row in examples
    )
    return max(min(same, min(unlearned) - 1), 0)


def cast_lora_inputs(model: Any, on: bool) -> None:
    """Let LoRA layers cast their input to float32, or not: autocast would undo it."""
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "_cast_input_dtype"):
            module.cast_input_dtype_enabled = on


def _checkpointed(model: Any) -> bool:
    return any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


@contextmanager
def _mixed_precision(trainer: Any) -> Iterator[None]:
    """Products in bfloat16 where the trainer asks for it."""
    import torch

    if not trainer.args.bf16:
        yield
        return
    if not _checkpointed(trainer.model):
        # The second forward of checkpointing comes later, and must be as the first.
        cast_lora_inputs(trainer.model, False)
    try:
        # After a training Accelerate's own autocast is off, so that it can generate.
        with torch.autocast(trainer.args.device.type, torch.bfloat16):
            yield
    finally:  # a run that is interrupted leaves a model that can generate
        cast_lora_inputs(trainer.model, True)


def use_completion_loss(trainer: Any) -> None:
    """Make a built `Trainer` or `SFTTrainer` compute `completion_loss`, unpadded.

    Batches without a label for each token (a classifier's), evaluations that need
    logits (`compute_metrics`) and a trainer whose loss is another go their own way.
    """
    if _has_own_loss(trainer):
        return
    original = trainer.compute_loss

    def compute_loss(model, inputs, return_outputs=False, num_items_in_batch=None):
        needs_logits = return_outputs and trainer.compute_metrics is not None
        labels = inputs.get("labels")  # a classifier has one for each text: (B,)
        if labels is None or labels.dim() != 2 or needs_logits:
            return original(model, inputs, return_outputs, num_items_in_batch)
        inputs = without_padding(trainer.model, inputs)
        with _mixed_precision(trainer):
            weight = getattr(trainer, "router_aux_loss_coef", None)
            if weight and num_items_in_batch is not None:  # TRL's mean over an update
                weight = weight / trainer.current_gradient_accumulation_steps
            loss = completion_loss(model, inputs, num_items_in_batch, weight)
        return (loss, {"loss": loss}) if return_outputs else loss

    trainer.compute_loss = compute_loss


def _has_own_loss(trainer: Any) -> bool:
    head = getattr(base_model(trainer.model), "get_output_embeddings", lambda: None)()
    written_in = type(trainer).compute_loss.__module__.partition(".")[0]
    return (
        head is None  # a classifier of tokens, or of several classes at once
        or written_in not in ("transformers", "trl")
        or trainer.compute_loss_func is not None
        or trainer.label_smoother is not None
        or getattr(trainer.args, "loss_type", "nll") != "nll"
    )


def set_attention(model: Any, name: str | None) -> None:
    """Switch to `"eager"` (plain products) or `"sdpa"` (fused), where one is named."""
    base = base_model(model)
    if getattr(base.config, "_attn_implementation", None) not in (None, name):
        base.set_attn_implementation(name)


class _Int8Weight:
    """A weight (o, i) in int8 with a scale for each row, packed for products."""

    def __init__(self, weight: torch.Tensor, levels: int) -> None:
        import torch

        self.scale = weight.abs().amax(dim=1).clamp(min=1e-30) / levels  # (o,)
        values = (weight / self.scale[:, None]).round().to(torch.int8)
        self.packed = torch.ops.onednn.qlinear_prepack(values.contiguous(), None)
        self.zero = torch.zeros_like(self.scale, dtype=torch.int32)

    def times(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """x Wᵀ (M, o), in float32, of what `_rounded` makes of x (M, i)."""
        import torch

        product = torch.ops.onednn.qlinear_pointwise(
            *(values, 1.0, 128, self.packed, self.scale, self.zero, None),
            *(1.0, 0, torch.float32, "none", [], ""),
        )
        return product.mul_(scale)


def _rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor (..., i) as bytes (M, i), and a scale for each row (M, 1) in float32.

    x is (bytes - 128) · scale, within half a scale: 1/254 of the row's greatest number.
    """
    import torch

    x = x.detach().reshape(-1, x.shape[-1]).float()
    scale = torch.linalg.vector_norm(x, ord=torch.inf, dim=1, keepdim=True)
    scale = scale.clamp_(min=1e-30).mul_(1 / 127)
    half = torch.full_like(scale, 128.5)  # what is behind the point is cut off
    return torch.addcmul(half, x, scale.reciprocal()).to(torch.uint8), scale


def int8_levels() -> int:
    """The greatest int8 weight whose products are right on this processor.

    127, or 63: without VNNI two products are added in 16 bits, and a sum above 32,767
    becomes 32,767 without a word.
    """
    import torch

    greatest = torch.full((64, 64), 255, dtype=torch.uint8), torch.ones(64, 1)
    product = _Int8Weight(torch.ones(64, 64), 127).times(*greatest)
    return 127 if product.allclose(torch.tensor(64 * 127.0)) else 63


@contextmanager
def int8_products(model: Any) -> Iterator[list[Any]]:
    """While inside, a model in training multiplies by its frozen matrices in int8.

    That is x Wᵀ forward and g W backward, for each frozen `Linear` on a CPU, one in 4
    bits too, but the output layer. x and g (M, d) are rounded by row, W by row for the
    way forward and by column for the way back: 2 bytes a weight more. All else stays as
    it is, and in evaluation mode everything (SwitchBack, 2023, arXiv 2304.13013).
    Yields the layers; raises ValueError if there is none. Copy no model meanwhile.
    """
    layers = _frozen_linear(model)
    levels, shared = int8_levels(), {}
    for layer in layers:
        layer.forward = _int8_forward(layer, levels, shared)
    try:
        yield layers
    finally:
        for layer in layers:
            del layer.forward


def _frozen_linear(model: Any) -> list[Any]:
    """Frozen linear layers on a CPU, without the head, adapters and small ones."""
    from torch.nn import Linear

    head = getattr(base_model(model), "get_output_embeddings", lambda: None)()
    rest = set(head.modules() if head is not None else ())
    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, Linear) and module not in rest and ".lora_" not in name
        if min(module.in_features, module.out_features) >= INT8_AT_LEAST
    ]
    weights = [(layer, layer.weight) for layer in linear]
    layers = [m for m, w in weights if not w.requires_grad and w.device.type == "cpu"]
    if not layers:
        raise ValueError(
            f"{type(base_model(model)).__name__} has no frozen Linear layer on the CPU "
            "to multiply in int8. Leave int8 out."
        )
    return layers


def _int8_forward(layer: Any, levels: int, shared: dict[str, Any]) -> Any:
    """A layer's forward, in int8 while it trains; q, k and v round their x once."""
    import torch

    exact, bias, bare = layer.forward, layer.bias, copy(layer)
    half = layer.weight.dtype if layer.weight.element_size() == 2 else None
    bare._parameters = layer._parameters | {"bias": None}
    with torch.no_grad(), torch.autocast("cpu", half, enabled=half is not None):
        weight = bare(torch.eye(layer.in_features)).float()  # Wᵀ, of 4-bit layers too
    forth, back = _Int8Weight(weight.t(), levels), _Int8Weight(weight, levels)

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not layer.training:
            return exact(x)
        last = shared.get("of")
        if last is None or last() is not x or shared["version"] != x._version:
            shared.update(of=ref(x), version=x._version, rounded=_rounded(x))
        y = _int8_function().apply(x, *shared["rounded"], forth, back)
        return y if bias is None else y + bias.to(y.dtype)

    return forward


@cache
def _int8_function() -> Any:
    import torch

    class Int8Product(torch.autograd.Function):
        """x Wᵀ (..., o), and on the way back g W (..., i), both of rounded numbers."""

        @staticmethod
        def forward(ctx, x, values, scale, forth, back):
            ctx.back, ctx.like = back, (x.shape, x.dtype)
            under = torch.is_autocast_enabled("cpu")
            dtype = torch.get_autocast_dtype("cpu") if under else x.dtype
            return forth.times(values, scale).to(dtype).unflatten(0, x.shape[:-1])

        @staticmethod
        def backward(ctx, gradient):
            shape, dtype = ctx.like
            to_x = ctx.back.times(*_rounded(gradient)).to(dtype)
            return to_x.view(shape), None, None, None, None

    return Int8Product


def int8_gain(model: Any, *, bf16: bool = False, tokens: int = 512) -> float:
    """How many times as fast the largest frozen matrix is in int8, both ways, here.

    The median of five pairs in turn, rounding included; `bf16` under autocast.
    """
    import torch

    layer = max(_frozen_linear(model), key=lambda m: m.in_features * m.out_features)
    layer = copy(layer).train()
    bf16 = bf16 or layer.weight.dtype == torch.bfloat16
    x = torch.ones(tokens, layer.in_features, requires_grad=True)
    int8 = _int8_forward(layer, int8_levels(), {})

    def seconds(forward: Any) -> float:
        start = perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = forward(x.view_as(x))  # a new tensor, which nobody has rounded
        torch.autograd.grad(y, x, torch.ones_like(y))
        return perf_counter() - start

    return median(seconds(layer.forward) / seconds(int8) for _ in range(5))


@contextmanager
def int8_where_faster(trainer: Any, wanted: bool) -> Iterator[None]:
    """`int8_products` if they are wanted and gain a tenth or more; a line says so."""
    import torch

    able = trainer.args.device.type == "cpu" and torch.backends.mkldnn.is_available()
    gain = int8_gain(trainer.model, bf16=trainer.args.bf16) if wanted and able else 0.0
    taken = gain >= 1.1
    if wanted:
        print(f"int8: {gain:.2g} times as fast as exact, {'not ' * (not taken)}taken")
    with int8_products(trainer.model) if taken else nullcontext():
        yield
