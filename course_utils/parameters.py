"""Count parameters: of a model in memory, or of a method before any model exists.

`adapter_parameters` and `adapter_bytes` need only a configuration: a model of that
shape is built on torch's meta device, which holds no weights (7B takes 0.1 s), PEFT's
own rules say which of its modules are adapted, and arithmetic does the rest.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from torch.nn import Module
    from transformers import PretrainedConfig

    Method = str | PeftConfig

# Method -> PEFT's class and the options that are the method. `pissa` and `qlora` train
# what `lora` trains; they differ in how W is kept.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {}),
    "dora": ("LoraConfig", {"use_dora": True}),
    "pissa": ("LoraConfig", {"init_lora_weights": "pissa"}),
    "qlora": ("LoraConfig", {}),
    "ia3": ("IA3Config", {}),
    "prompt_tuning": ("PromptTuningConfig", {}),
    "prefix_tuning": ("PrefixTuningConfig", {}),
    "p_tuning": ("PromptEncoderConfig", {}),
}


def peft_config(method: Method, **options: Any) -> PeftConfig:
    """PEFT's config for a key of `METHODS` and PEFT's options; a config is copied.

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
        known = ", ".join(METHODS)
        raise ValueError(f"unknown method {method!r}; known: full, {known}")
    class_name, fixed = METHODS[method]
    return getattr(peft, class_name)(**(fixed | options))


_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
}
_skeletons: dict[str, Module] = {}


def skeleton(config: PretrainedConfig, task_type: Any = None) -> Module:
    """Build the model of a configuration without weights, on the meta device.

    The last few are kept, as a slider asks for the same one many times.

    Raises:
        ValueError: a task other than PEFT's `"CAUSAL_LM"` (also None) and `"SEQ_CLS"`.
    """
    task = getattr(task_type, "value", task_type) or "CAUSAL_LM"
    if task not in _AUTO_CLASSES:
        raise ValueError(f"task_type is CAUSAL_LM or SEQ_CLS, not {task!r}")
    # the JSON lacks num_labels
    key = f"{task} {config.num_labels} {config.to_json_string(use_diff=False)}"
    if key not in _skeletons:
        import torch
        import transformers

        config = copy.deepcopy(config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model = getattr(transformers, _AUTO_CLASSES[task]).from_config(config)
        if len(_skeletons) > 15:
            _skeletons.clear()
        _skeletons[key] = model
    return _skeletons[key]


def _numel(module: Module) -> int:
    return sum(p.numel() for p in module.parameters())


def target_modules(model: Module, config: PeftConfig) -> list[tuple[str, Module]]:
    """Find (name, module) of each base module that a PEFT config adapts.

    Raises ValueError: no module matches, or PEFT has no default for this model type.
    """
    from peft.tuners import tuners_utils

    config = copy.copy(config)
    if config.target_modules is None:
        role = f"{config.peft_type.value}_TARGET"
        config.target_modules = _default_targets(role, model)
    targets = config.target_modules
    config = tuners_utils._maybe_include_all_linear_layers(config, model)
    matches = [
        (name, module)
        for name, module in model.named_modules()
        if name and tuners_utils.check_target_module_exists(config, name)
    ]
    if not matches:
        raise ValueError(f"no module matches target_modules={targets!r}")
    return matches


def _default_targets(role: str, model: Module) -> list[str]:
    """PEFT's own choice of modules, such as q_proj and v_proj for LoRA on Llama."""
    from peft.utils import constants

    table = getattr(constants, f"TRANSFORMERS_MODELS_TO_{role}_MODULES_MAPPING")
    model_type = model.config.model_type
    if model_type not in table:
        raise ValueError(f"PEFT has no default for {model_type}: name target_modules")
    return table[model_type]


def lora_target_names(model: Module) -> list[str]:
    """Short names of all linear layers but the output head, sorted: what to give LoRA.

    They are what `target_modules="all-linear"` finds on plain, 4-bit and 8-bit models.
    """
    from peft import LoraConfig

    # the task leaves out a classifier's head, too
    config = LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
    return sorted({name.split(".")[-1] for name, _ in target_modules(model, config)})


def features(name: str, module: Module) -> tuple[int, int]:
    """Input and output width of a Linear, an Embedding or GPT-2's Conv1D.

    Raises ValueError: another kind of module, which has no formula.
    """
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    if hasattr(module, "num_embeddings"):
        return module.num_embeddings, module.embedding_dim
    layer_type = type(module).__name__
    if layer_type == "Conv1D":
        return tuple(module.weight.shape)
    raise ValueError(f"no formula for {name}, a {layer_type}: choose linear layers")


def lora_rank(name: str, config: PeftConfig) -> int:
    """The rank of one module's adapter: `r`, unless `rank_pattern` has another."""
    from peft.utils.other import get_pattern_key

    return config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)


# LoraConfig's fields that add or change parameters in ways not counted here.
_NOT_COUNTED = (
    *("layer_replication", "target_parameters", "trainable_token_indices"),
    *("use_qalora", "use_bdlora", "arrow_config", "kasa_config"),
    *("monteclora_config", "velora_config"),
)


def _saved_names(model: Module, config: PeftConfig) -> list[str]:
    """Modules that train as copies: `modules_to_save`, and the head of a classifier."""
    ends = tuple(getattr(config, "modules_to_save", None) or ())
    if getattr(config.task_type, "value", config.task_type) == "SEQ_CLS":
        ends += ("classifier", "score")
    names: list[str] = []
    for name, _ in model.named_modules():
        inside = name.startswith(tuple(f"{outer}." for outer in names))
        if name.endswith(ends) and not inside:
            names.append(name)
    return names


def _lora(model: Module, config: PeftConfig) -> int:
    unknown = [field for field in _NOT_COUNTED if getattr(config, field, None)]
    if unknown:
        raise ValueError(f"no formula for a LoraConfig with {', '.join(unknown)}")
    total = 0
    for name, module in target_modules(model, config):
        d_in, d_out = features(name, module)
        r = lora_rank(name, config)
        total += r * d_in + d_out * r  # A is (r, d_in), B is (d_out, r)
        total += d_out * bool(config.use_dora) + d_out * bool(config.lora_bias)
        if config.bias == "lora_only" and getattr(module, "bias", None) is not None:
            total += module.bias.numel()
    if config.bias == "all":  # but for the frozen originals of saved modules
        saved = tuple(f"{name}." for name in _saved_names(model, config))
        total += sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if name.endswith("bias") and not name.startswith(saved)
        )
    return total


def _ia3(model: Module, config: PeftConfig) -> int:
    from peft import IA3Model

    if config.feedforward_modules is None:
        config.feedforward_modules = _default_targets("IA3_FEEDFORWARD", model)
    total = 0
    for name, module in target_modules(model, config):
        d_in, d_out = features(name, module)
        # one factor per output; per input where the module is a feedforward one
        feedforward = IA3Model._check_target_module_feedforward(config, name)
        total += d_in if feedforward else d_out
    return total


def _virtual_shape(model: Module, config: PeftConfig) -> tuple[int, int]:
    """Number and width of the virtual tokens."""
    if not config.num_virtual_tokens:
        raise ValueError(f"{config.peft_type.value} needs num_virtual_tokens=")
    tokens = config.num_virtual_tokens * (config.num_transformer_submodules or 1)
    return tokens, config.token_dim or model.config.get_text_config().hidden_size


def _prompt_tuning(model: Module, config: PeftConfig) -> int:
    return math.prod(_virtual_shape(model, config))


def _prefix_tuning(model: Module, config: PeftConfig) -> int:
    base = model.config.get_text_config()
    n, width = _virtual_shape(model, config)
    layers = config.num_layers or base.num_hidden_layers
    kv_heads = getattr(base, "num_key_value_heads", None)
    if kv_heads:
        heads = config.num_attention_heads or base.num_attention_heads
        width = (getattr(base, "head_dim", None) or width // heads) * kv_heads
    if not config.prefix_projection:
        return n * layers * 2 * width  # keys and values
    h = config.encoder_hidden_size or width
    return n * width + (width * h + h) + (h + 1) * layers * 2 * width


def _p_tuning(model: Module, config: PeftConfig) -> int:
    n, d = _virtual_shape(model, config)
    h = config.encoder_hidden_size or d
    encoder = config.encoder_reparameterization_type
    if getattr(encoder, "value", encoder) == "MLP":
        return n * d + (d * h + h) + (h * h + h) + (h * d + d)
    # two directions of 4 gates: input and state weights, two biases each
    lstm, wide = 0, d
    for _ in range(config.encoder_num_layers):
        lstm += 2 * 4 * (h * wide + h * h + 2 * h)
        wide = 2 * h
    head = (2 * h * 2 * h + 2 * h) + (2 * h * d + d)
    return n * d + lstm + head


_FORMULAS = {  # by PEFT's type of a method
    "LORA": _lora,
    "IA3": _ia3,
    "PROMPT_TUNING": _prompt_tuning,
    "PREFIX_TUNING": _prefix_tuning,
    "P_TUNING": _p_tuning,
}


def _count(model: Module, config: PeftConfig, *, in_file: bool = False) -> int:
    """Parameters that a config trains, or, `in_file`, that its saved file holds."""
    peft_type = getattr(config.peft_type, "value", config.peft_type)
    if peft_type not in _FORMULAS:
        raise ValueError(f"no formula for {peft_type}, only for {list(_FORMULAS)}")
    if in_file and peft_type == "P_TUNING":
        peft_type = "PROMPT_TUNING"
    if in_file and peft_type == "PREFIX_TUNING":
        config.prefix_projection = False
    saved = [model.get_submodule(name) for name in _saved_names(model, config)]
    return _FORMULAS[peft_type](model, config) + sum(map(_numel, saved))


def adapter_parameters(config: PretrainedConfig, method: Method, **options: Any) -> int:
    """Count what a method trains, as `print_trainable_parameters`, without weights.

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

    Copies made by `modules_to_save` and biases trained by `bias=` are counted. The
    method may be a PEFT config; options are PEFT's fields, with PEFT's defaults.

    Raises:
        ValueError: unknown method, no module matches, or a field without a formula.
        TypeError: PEFT has no option of that name.

    Sources: LoRA, arXiv:2106.09685; DoRA, arXiv:2402.09353; IA3, arXiv:2205.05638;
    prompt tuning, arXiv:2104.08691; prefix tuning, arXiv:2101.00190; P-tuning,
    arXiv:2103.10385.

    >>> from transformers import LlamaConfig
    >>> adapter_parameters(LlamaConfig(), "lora", r=64)  # Llama-2-7B, q and v
    33554432
    """
    if method == "full":
        if options:
            raise ValueError(f"full fine-tuning takes no options: {options}")
        return _numel(skeleton(config))
    method = peft_config(method, **options)
    return _count(skeleton(config, method.task_type), method)


def adapter_bytes(
    config: PretrainedConfig, method: Method, *, dtype: str = "float32", **options: Any
) -> int:
    """Bytes of the tensors in a saved adapter file; `"full"` gives the whole model.

    `dtype` is what is stored: PEFT keeps adapters in float32, whatever the base is. The
    file also has a header that names the tensors, about 100 bytes each. Prompt methods
    save the virtual tokens that their encoder produced, never the encoder; a LoRA that
    targets an embedding saves the base embeddings too. Errors: `adapter_parameters`'s.
    """
    import torch

    itemsize = getattr(torch, dtype).itemsize
    if method == "full":
        return itemsize * adapter_parameters(config, "full", **options)
    method = peft_config(method, **options)
    model = skeleton(config, method.task_type)
    stored = _count(model, method, in_file=True)
    if method.peft_type == "LORA":
        for name, module in target_modules(model, method):
            if name.split(".")[-1] in ("embed_tokens", "lm_head"):
                stored += _numel(module)
    return itemsize * stored


# --- a model in memory -----------------------------------------------------------


def _elements(parameter: torch.nn.Parameter) -> int:
    """Logical elements: a packed 4-bit weight stands for two a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def _constants(module: Module) -> Iterator[torch.Tensor | None]:
    """Tensors that bitsandbytes keeps beside the weights of one module, and Nones."""
    weight = module._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    while state is not None:  # the second state is double quantization's
        yield from (state.absmax, state.code, state.offset)
        state = state.state2
    for owner in (weight, getattr(module, "state", None)):  # where 8-bit scales are
        yield getattr(owner, "SCB", None)


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has. Printed, it reads as PEFT's own line."""

    total: int  # tied ones once
    trainable: int  # those with `requires_grad`
    bytes: int  # that hold all of them, quantization constants included

    @property
    def frozen(self) -> int:
        return self.total - self.trainable

    @property
    def trainable_percent(self) -> float:
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        return (
            f"trainable params: {self.trainable:,} || all params: {self.total:,} || "
            f"trainable%: {self.trainable_percent:.4f}"
        )


def count_parameters(model: Module) -> ParameterCount:
    """Count a model's parameters, as PEFT does, and the bytes that hold them.

    Tied weights count once, a bitsandbytes 4-bit weight its logical elements; its bytes
    include the scales (`absmax`). Buffers are not parameters. A model on the meta
    device is counted as if it were filled.

    >>> import torch
    >>> print(count_parameters(torch.nn.Linear(3, 2)))
    trainable params: 8 || all params: 8 || trainable%: 100.0000
    """
    parameters = list(model.parameters())
    total = sum(map(_elements, parameters))
    trainable = sum(_elements(p) for p in parameters if p.requires_grad)
    constants = itertools.chain.from_iterable(map(_constants, model.modules()))
    tensors = {id(t): t for t in (*parameters, *constants) if t is not None}
    return ParameterCount(total, trainable, sum(t.nbytes for t in tensors.values()))
