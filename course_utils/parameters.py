"""Count parameters: of a model in memory, module by module, or before it exists.

`count_parameters` and `parameter_table` look at a model; `adapter_parameters`,
`adapter_bytes` and `predict_parameters` need only its configuration.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import PretrainedConfig

__all__ = [
    "ParameterCount",
    "ParameterRow",
    "ParameterTable",
    "adapter_bytes",
    "adapter_parameters",
    "count_parameters",
    "lora_target_names",
    "parameter_table",
    "predict_parameters",
]

# --- targets ---
# Which modules a PEFT config adapts, and their shapes, without any weights.
#
# The shapes come from a model built on torch's meta device, which holds no weights: 7B
# takes 0.1 s. The matching follows PEFT's rules, written out, so that `closed_forms`
# can
# count from a configuration alone.

# `pissa` and `qlora` train what `lora` trains; they differ in how W is kept.
METHODS = {
    "lora": "LoraConfig",
    "dora": "LoraConfig",
    "pissa": "LoraConfig",
    "qlora": "LoraConfig",
    "ia3": "IA3Config",
    "prompt_tuning": "PromptTuningConfig",
    "prefix_tuning": "PrefixTuningConfig",
    "p_tuning": "PromptEncoderConfig",
}


def peft_config(method: str | PeftConfig, **options: Any) -> PeftConfig:
    """Turn a method's name and its options into PEFT's own config object.

    Args:
        method: a key of `METHODS`, or a PEFT config, of which a copy is returned.
        **options: PEFT's fields for that config, with PEFT's defaults.

    Raises:
        ValueError: the method is unknown, or options come with a PEFT config.
        TypeError: PEFT has no option of that name.
    """
    import peft

    if not isinstance(method, str):
        if options:
            raise ValueError(f"the PEFT config already holds the options: {options}")
        return copy.deepcopy(method)
    if method not in METHODS:
        raise ValueError(
            f"unknown method {method!r}; known: full, {', '.join(METHODS)}"
        )
    fixed = {"dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}}
    return getattr(peft, METHODS[method])(**(fixed.get(method, {}) | options))


_skeletons: dict[str, torch.nn.Module] = {}


def skeleton(config: PretrainedConfig, task_type: Any = None) -> torch.nn.Module:
    """Build the model of a configuration without weights, on the meta device.

    Args:
        config: a transformers configuration.
        task_type: PEFT's `"CAUSAL_LM"` (also None) or `"SEQ_CLS"`.

    Raises:
        ValueError: another task type.
    """
    task = getattr(task_type, "value", task_type)
    autos = {
        None: "AutoModelForCausalLM",
        "CAUSAL_LM": "AutoModelForCausalLM",
        "SEQ_CLS": "AutoModelForSequenceClassification",
    }
    if task not in autos:
        raise ValueError(f"task_type is CAUSAL_LM or SEQ_CLS, not {task!r}")
    # num_labels is spelled out, as it is not a field of the JSON
    key = f"{task} {config.num_labels} {config.to_json_string(use_diff=False)}"
    if key not in _skeletons:
        import torch
        import transformers

        config = copy.deepcopy(config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = getattr(transformers, autos[task]).from_config(config)
        if len(_skeletons) > 15:
            _skeletons.clear()
        _skeletons[key] = model
    return _skeletons[key]


def numel(module: torch.nn.Module) -> int:
    """Elements of all parameters of a module that is not quantized."""
    return sum(p.numel() for p in module.parameters())


def ends_with(name: str, ends: Any) -> bool:
    """PEFT's rule: a list names whole trailing parts, a string is a full regex."""
    if isinstance(ends, str):
        return re.fullmatch(ends, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in ends or ())


def _layer_index(name: str, pattern: Any) -> int | None:
    patterns = [pattern] if isinstance(pattern, str) else (pattern or [r"[^.]*"])
    for part in patterns:
        if found := re.match(rf"(?:^|.*?\.){part}\.(\d+)\.", name):
            return int(found[1])
    return None


def _is_target(name: str, config: PeftConfig) -> bool:
    if ends_with(name, config.exclude_modules):
        return False
    saved = config.modules_to_save or ()
    if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in saved):
        return False
    if not ends_with(name, config.target_modules):
        return False
    layers = getattr(config, "layers_to_transform", None)
    if isinstance(config.target_modules, str) or layers in (None, []):
        return True
    wanted = [layers] if isinstance(layers, int) else layers
    return _layer_index(name, config.layers_pattern) in wanted


def features(name: str, module: torch.nn.Module) -> tuple[int, int]:
    """Input and output width of a Linear, an Embedding or GPT-2's Conv1D."""
    kind = type(module).__name__
    if kind == "Conv1D":
        return tuple(module.weight.shape)
    if kind == "Embedding":
        return module.num_embeddings, module.embedding_dim
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    raise ValueError(f"no formula for {name}, a {kind}: choose linear layers")


def default_targets(kind: str, model_type: str) -> list[str]:
    """PEFT's own choice of modules, such as q_proj and v_proj for LoRA on Llama.

    Args:
        kind: `"LORA_TARGET"`, `"IA3_TARGET"` or `"IA3_FEEDFORWARD"`.
        model_type: the configuration's `model_type`.

    Raises:
        ValueError: PEFT has no default for this model type.
    """
    from peft.utils import constants

    table = getattr(constants, f"TRANSFORMERS_MODELS_TO_{kind}_MODULES_MAPPING")
    if model_type not in table:
        raise ValueError(f"PEFT has no default for {model_type}: name target_modules")
    return table[model_type]


def target_modules(
    model: torch.nn.Module, config: PeftConfig
) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield (name, module) of each base module that a LoRA or IA3 config adapts.

    Raises:
        ValueError: no module matches, or PEFT has no default for this model type.
    """
    config = copy.copy(config)
    targets = config.target_modules
    if targets is None:
        kind = config.peft_type.value + "_TARGET"
        config.target_modules = default_targets(kind, model.config.model_type)
    elif isinstance(targets, str) and targets.lower() == "all-linear":
        config.target_modules = linear_names(model)
    found = False
    for name, module in model.named_modules():
        if _is_target(name, config):
            found = True
            yield name, module
    if not found:
        raise ValueError(f"no module matches target_modules={targets!r}")


def linear_names(model: torch.nn.Module) -> list[str]:
    """Full names of all linear layers except the output head, quantized ones too."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    heads = [head] if head is not None else []
    heads += [getattr(model, name, None) for name in ("score", "classifier")]
    kinds = ("Linear", "Linear4bit", "Linear8bitLt", "Conv1D")
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in kinds and not any(module is h for h in heads)
    ]


# --- closed_forms ---
# How many parameters a PEFT method trains, from a configuration alone.
#
# Each formula is a line of arithmetic on the shapes of the base model, which `targets`
# finds. `parameters` offers the public names.
#
# Letters: `L` layers, `d` width, `r` rank, `n` virtual tokens, `h` encoder width.

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


# --- parameter_rows ---
# A model's parameters row by row, equal layers in one row, with their true bytes.
#
# `parameters` offers `parameter_table`.


def elements(parameter: torch.nn.Parameter) -> int:
    """Logical elements: a packed 4-bit weight stands for two a byte."""
    if type(parameter).__name__ == "Params4bit":
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            return state.shape.numel()
        if getattr(parameter, "bnb_quantized", False):
            return parameter.numel() * 2 * parameter.element_size()
    return parameter.numel()


def _constants(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    """Tensors that bitsandbytes keeps beside the weights of one module."""
    import torch

    weight = module._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    while state is not None:  # the second state is double quantization's
        yield from (state.absmax, state.code, state.offset)
        state = state.state2
    eight_bit = getattr(module, "state", None)
    for owner in (weight, eight_bit):
        scale = getattr(owner, "SCB", None)
        if isinstance(scale, torch.Tensor):
            yield scale


def module_bytes(module: torch.nn.Module, seen: set[int]) -> int:
    """Bytes held by one module itself, skipping tensors that are in `seen`."""
    tensors = [*module._parameters.values(), *_constants(module)]
    total = 0
    for tensor in tensors:
        if tensor is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            total += tensor.numel() * tensor.element_size()
    return total


@dataclass(frozen=True)
class ParameterRow:
    """One line of a parameter table: a module, or equal modules of several layers.

    Attributes:
        name: the module; numbers are gathered: `layers[0-29].mlp.up_proj`.
        shape: shapes of its own tensors, such as `1536 x 576`.
        modules: how many modules the row stands for.
        parameters: elements in all of them together.
        trainable: how many of these train.
        bytes: bytes that hold them.
    """

    name: str
    shape: str
    modules: int
    parameters: int
    trainable: int
    bytes: int


@dataclass(frozen=True)
class ParameterTable:
    """Rows of `parameter_table`; prints as an aligned table with a last line of sums.

    Attributes:
        rows: `ParameterRow`s in the model's own order.
    """

    rows: tuple[ParameterRow, ...]

    def __iter__(self) -> Iterator[ParameterRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        numbers = ("modules", "parameters", "trainable", "bytes")
        sums = [sum(getattr(row, field) for row in self.rows) for field in numbers]
        lines = [("module", "shape", *numbers)]
        for row in self.rows:
            cells = [f"{getattr(row, field):,}" for field in numbers]
            lines.append((row.name, row.shape, *cells))
        lines.append(("total", "", *[f"{value:,}" for value in sums]))
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )

    __repr__ = __str__


def _ranges(numbers: set[int]) -> str:
    """Write {0, 1, 2, 5} as `0-2,5`."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in parts)


def parameter_table(
    model: torch.nn.Module, *, depth: int | None = None
) -> ParameterTable:
    """List a model's modules with their parameters, equal layers in one row.

    Args:
        model: any torch module, on any device, meta included.
        depth: how many parts of a name to keep: 2 gathers `model.layers[0-29].mlp.up`
            in `model.layers[0-29]`. None keeps each module that holds parameters.

    Raises:
        ValueError: depth is not positive.

    Examples:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
        >>> print(parameter_table(net))
        module  shape     modules  parameters  trainable  bytes
        [0-1]   3 x 3, 3        2          24         24     96
        total                   2          24         24     96
    """
    if depth is not None and depth < 1:
        raise ValueError(f"depth is at least 1, not {depth}")
    groups: dict[tuple, list] = {}
    counted: set[int] = set()
    weighed: set[int] = set()
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None]
        if not own:
            continue
        fresh = [p for p in own if id(p) not in counted]
        counted.update(map(id, own))
        shapes = [
            " x ".join(
                map(str, getattr(getattr(p, "quant_state", p), "shape", p.shape))
            )
            for p in own
        ]
        # "a.b.0.c" -> parts "a", "b[#]", "c" and the number 0
        parts = re.sub(r"(?:^|\.)(\d+)(?=\.|$)", "[#]", name).split(".")
        kept = ".".join(parts if depth is None else parts[:depth])
        numbers = [int(n) for n in re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)]
        numbers = numbers[: kept.count("[#]")]
        whole = depth is None or len(parts) <= depth
        label = ", ".join(shapes) + ("" if fresh else " (tied)")
        trains = [p.requires_grad for p in own] if whole else None
        key = (kept, label if whole else "", str(trains))
        row = groups.setdefault(key, [[set() for _ in numbers], 0, 0, 0, 0])
        for seen, number in zip(row[0], numbers, strict=True):
            seen.add(number)
        row[1] += 1
        row[2] += sum(map(elements, fresh))
        row[3] += sum(elements(p) for p in fresh if p.requires_grad)
        row[4] += module_bytes(module, weighed)
    rows = []
    for (name, shape, _), (numbers, *figures) in groups.items():
        for seen in numbers:
            name = name.replace("[#]", f"[{_ranges(seen)}]", 1)
        rows.append(ParameterRow(name or "(model)", shape, *figures))
    return ParameterTable(tuple(rows))


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has. Printed, it reads as PEFT's own line.

    Attributes:
        total: all parameters, tied ones once.
        trainable: those that training changes (`requires_grad`).
        bytes: bytes that hold all of them, quantization constants included.

    Examples:
        >>> print(ParameterCount(total=1000, trainable=5, bytes=4000))
        trainable params: 5 || all params: 1,000 || trainable%: 0.5000
    """

    total: int
    trainable: int
    bytes: int

    @property
    def frozen(self) -> int:
        """Parameters that training leaves alone."""
        return self.total - self.trainable

    @property
    def trainable_percent(self) -> float:
        """Trainable parameters in per cent of all, 0 to 100."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return (
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || "
            f"trainable%: {self.trainable_percent:.4f}"
        )


def count_parameters(model: torch.nn.Module) -> ParameterCount:
    """Count a model's parameters and the bytes that hold them.

    Tied weights count once. A bitsandbytes 4-bit weight counts its logical elements,
    and its bytes include the scales (`absmax`). Buffers are not parameters. The counts
    agree with PEFT's `get_nb_trainable_parameters`. A model on the meta device is
    counted as if it were filled.

    Args:
        model: any torch module, PEFT models included.

    Returns:
        The counts; printed, PEFT's own line.

    Examples:
        >>> import torch
        >>> print(count_parameters(torch.nn.Linear(3, 2)))
        trainable params: 8 || all params: 8 || trainable%: 100.0000
    """
    total = trainable = 0
    for parameter in model.parameters():
        size = elements(parameter)
        total += size
        trainable += size if parameter.requires_grad else 0
    seen: set[int] = set()
    held = sum(module_bytes(module, seen) for module in model.modules())
    return ParameterCount(total, trainable, held)


def predict_parameters(
    config: PretrainedConfig,
    method: str | PeftConfig,
    *,
    dtype: str = "float32",
    **options: Any,
) -> ParameterCount:
    """Foretell `count_parameters` of a fine-tuned model, from its configuration.

    Args:
        config: a transformers configuration.
        method: as in `adapter_parameters`, `"full"` included. For `"qlora"` the bytes
            are those before quantization: `memory.estimate_memory` foretells the rest.
        dtype: what the base model is kept in; adapters are kept in float32.
        **options: as in `adapter_parameters`.

    Raises:
        ValueError: as in `adapter_parameters`.

    Examples:
        >>> from transformers import LlamaConfig
        >>> print(predict_parameters(LlamaConfig(), "lora", r=64))
        trainable params: 33,554,432 || all params: 6,771,970,048 || trainable%: 0.4955
    """
    import torch

    width = getattr(torch, dtype).itemsize
    if method == "full":
        base = adapter_parameters(config, "full", **options)
        return ParameterCount(base, base, width * base)
    method = peft_config(method, **options)
    base = count_parameters(skeleton(config, method.task_type)).total
    trainable = added = adapter_parameters(config, method)
    if getattr(method, "bias", "none") != "none":  # biases train, but are not added
        method.bias = "none"
        added = adapter_parameters(config, method)
    return ParameterCount(base + added, trainable, width * base + 4 * added)


def lora_target_names(model: torch.nn.Module) -> list[str]:
    """Short names of all linear layers but the output head: what to give LoRA.

    This is the list that `target_modules="all-linear"` finds. Works on plain, 4-bit
    and 8-bit models.

    Args:
        model: a model without adapters.

    Returns:
        Sorted names, such as `["down_proj", ..., "v_proj"]`.
    """
    return sorted({name.split(".")[-1] for name in linear_names(model)})
