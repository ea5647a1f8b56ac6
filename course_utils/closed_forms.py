"""How many parameters a PEFT method trains, from a configuration alone.

Each formula is a line of arithmetic on the shapes of the base model, which `targets`
finds. `parameters` offers the public names.

Letters: `L` layers, `d` width, `r` rank, `n` virtual tokens, `h` encoder width.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from course_utils.targets import (
    default_targets,
    ends_with,
    features,
    numel,
    peft_config,
    skeleton,
    target_modules,
)

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import PretrainedConfig

# LoraConfig fields that add or change parameters in ways not counted here.
_NOT_COUNTED = (
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)


def _saved_names(model: torch.nn.Module, config: PeftConfig) -> tuple[str, ...]:
    ends = list(getattr(config, "modules_to_save", None) or ())
    if getattr(config.task_type, "value", config.task_type) == "SEQ_CLS":
        ends += ["classifier", "score"]
    names: tuple[str, ...] = ()
    for name, _ in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in names)
        if not inside and any(name.endswith(end) for end in ends):
            names += (name,)
    return names


def _lora(model: torch.nn.Module, config: PeftConfig) -> int:
    used = [field for field in _NOT_COUNTED if getattr(config, field, None)]
    if used:
        raise ValueError(f"no formula for a LoraConfig with {', '.join(used)}")
    total = 0
    targets = list(target_modules(model, config))
    for name, module in targets:
        d_in, d_out = features(name, module)
        rank = config.r
        for pattern, value in config.rank_pattern.items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                rank = value
                break
        total += rank * d_in + d_out * rank  # A is (r, d_in), B is (d_out, r)
        total += d_out * bool(config.use_dora) + d_out * bool(config.lora_bias)
        if config.bias == "lora_only" and getattr(module, "bias", None) is not None:
            total += module.bias.numel()
    if config.bias == "all":  # but for the frozen originals of saved modules
        saved = _saved_names(model, config)
        total += sum(
            p.numel()
            for n, p in model.named_parameters()
            if n.endswith("bias") and not any(n.startswith(f"{s}.") for s in saved)
        )
    return total


def _ia3(model: torch.nn.Module, config: PeftConfig) -> int:
    feedforward = config.feedforward_modules
    if feedforward is None:
        feedforward = default_targets("IA3_FEEDFORWARD", model.config.model_type)
    # one factor per output; per input where the module is a feedforward one
    return sum(
        features(name, module)[0 if ends_with(name, feedforward) else 1]
        for name, module in target_modules(model, config)
    )


def _virtual(config: PeftConfig) -> int:
    if not config.num_virtual_tokens:
        raise ValueError(f"{config.peft_type.value} needs num_virtual_tokens=")
    return config.num_virtual_tokens * (config.num_transformer_submodules or 1)


def _prompt_tuning(base: PretrainedConfig, config: PeftConfig) -> int:
    return _virtual(config) * (config.token_dim or base.hidden_size)


def _prefix_width(base: PretrainedConfig, config: PeftConfig) -> tuple[int, int]:
    """Layers, and the width of one layer's keys: KV heads x head size."""
    layers = config.num_layers or base.num_hidden_layers
    width = config.token_dim or base.hidden_size
    kv_heads = getattr(base, "num_key_value_heads", None)
    if kv_heads:
        heads = config.num_attention_heads or base.num_attention_heads
        width = (getattr(base, "head_dim", None) or width // heads) * kv_heads
    return layers, width


def _prefix_tuning(base: PretrainedConfig, config: PeftConfig) -> int:
    n, (layers, width) = _virtual(config), _prefix_width(base, config)
    if not config.prefix_projection:
        return n * layers * 2 * width  # keys and values
    h = config.encoder_hidden_size or width
    return n * width + (width * h + h) + (h + 1) * layers * 2 * width


def _p_tuning(base: PretrainedConfig, config: PeftConfig) -> int:
    n, d = _virtual(config), config.token_dim or base.hidden_size
    h = config.encoder_hidden_size or d
    kind = config.encoder_reparameterization_type
    if getattr(kind, "value", kind) == "MLP":
        return n * d + (d * h + h) + (h * h + h) + (h * d + d)
    # two directions of 4 gates: input and state weights, two biases each
    lstm, wide = 0, d
    for _ in range(config.encoder_num_layers):
        lstm += 2 * 4 * (h * wide + h * h + 2 * h)
        wide = 2 * h
    head = (2 * h * 2 * h + 2 * h) + (2 * h * d + d)
    return n * d + lstm + head


def _saved_modules(model: torch.nn.Module, config: PeftConfig) -> int:
    """Parameters of the trained copies of `modules_to_save` and of a classifier."""
    return sum(numel(model.get_submodule(name)) for name in _saved_names(model, config))


_FORMULAS = {
    "LORA": _lora,
    "IA3": _ia3,
    "PROMPT_TUNING": _prompt_tuning,
    "PREFIX_TUNING": _prefix_tuning,
    "P_TUNING": _p_tuning,
}


def _formula(config: PretrainedConfig, method: PeftConfig) -> tuple[Any, int]:
    kind = getattr(method.peft_type, "value", method.peft_type)
    if kind not in _FORMULAS:
        raise ValueError(f"no formula for {kind}; there is one for {list(_FORMULAS)}")
    model = skeleton(config, method.task_type)
    base = model if kind in ("LORA", "IA3") else config.get_text_config()
    return model, _FORMULAS[kind](base, method)


def adapter_parameters(
    config: PretrainedConfig, method: str | PeftConfig, **options: Any
) -> int:
    """Count the parameters that a method trains, without loading any weights.

    With `r` the rank, `(d_out, d_in)` a target's shape, `n` virtual tokens, `d` the
    width, `L` the layers, `k` = KV heads x head size and `h` the encoder's width:

    | method | parameters |
    |---|---|
    | lora, pissa, qlora | sum of r (d_in + d_out) over the targets |
    | dora | the same, and d_out for each target's magnitudes |
    | ia3 | sum of d_out, of d_in for feedforward targets |
    | prompt_tuning | n d |
    | prefix_tuning | n 2 L k |
    | ... with projection | n k + k h + h + (h + 1) 2 L k |
    | p_tuning (MLP) | n d + (d h + h) + (h h + h) + (h d + d) |
    | full | all of the model |

    Copies made by `modules_to_save` and biases trained by `bias=` are counted.

    Args:
        config: a transformers configuration (`model.config`, or written by hand).
        method: a name from the table, or a PEFT config object.
        **options: PEFT's fields (`r`, `target_modules`, `num_virtual_tokens`, ...)
            with PEFT's defaults.

    Returns:
        The number that `print_trainable_parameters` would show as trainable.

    Raises:
        ValueError: unknown method, no module matches, or a field without a formula.
        TypeError: PEFT has no option of that name.

    Sources: LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353; IA3, arXiv:2205.05638;
    prompt tuning, arXiv:2104.08691; prefix tuning, arXiv:2101.00190; P-tuning,
    arXiv:2103.10385.

    Examples:
        >>> from transformers import LlamaConfig
        >>> adapter_parameters(LlamaConfig(), "lora", r=64)  # Llama-2-7B, q and v
        33554432
    """
    if method == "full":
        if options:
            raise ValueError(f"full fine-tuning takes no options: {options}")
        return numel(skeleton(config))
    method = peft_config(method, **options)
    model, added = _formula(config, method)
    return added + _saved_modules(model, method)


def adapter_bytes(
    config: PretrainedConfig,
    method: str | PeftConfig,
    *,
    dtype: str = "float32",
    **options: Any,
) -> int:
    """Size in bytes of the tensors in a saved adapter file.

    The file itself also has a header that names the tensors, about 100 bytes each.
    Prompt methods save the virtual tokens that their encoder produced, never the
    encoder; a LoRA that targets an embedding saves the base embeddings too.

    Args:
        config: a transformers configuration.
        method: as in `adapter_parameters`; `"full"` gives the whole model.
        dtype: what is stored. PEFT keeps adapters in float32, whatever the base is.
        **options: as in `adapter_parameters`.

    Raises:
        ValueError: as in `adapter_parameters`.

    Examples:
        >>> from transformers import LlamaConfig
        >>> adapter_bytes(LlamaConfig(), "lora", r=64)  # 134 MB, MB = 10^6 bytes
        134217728
        >>> adapter_bytes(LlamaConfig(), "full", dtype="float16")  # against 13 GB
        13476831232
    """
    import torch

    width = getattr(torch, dtype).itemsize
    if method == "full":
        return width * adapter_parameters(config, "full", **options)
    method = peft_config(method, **options)
    model, stored = _formula(config, method)
    text, kind = config.get_text_config(), method.peft_type.value
    if kind == "P_TUNING":
        stored = _prompt_tuning(text, method)
    elif kind == "PREFIX_TUNING":
        layers, k = _prefix_width(text, method)
        stored = _virtual(method) * layers * 2 * k
    elif kind == "LORA":
        targets = {n.split(".")[-1] for n, _ in target_modules(model, method)}
        tables = model.get_input_embeddings(), model.get_output_embeddings()
        for name, table in zip(("embed_tokens", "lm_head"), tables, strict=True):
            stored += numel(table) if name in targets else 0
    return width * (stored + _saved_modules(model, method))
