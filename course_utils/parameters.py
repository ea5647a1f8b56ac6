"""Count parameters: of a model in memory, or of a method before any model exists.

`count_parameters` looks at a model. `adapter_parameters` and `adapter_bytes` need only
its configuration: a model of that shape is built on torch's meta device, which holds no
weights (7B takes 0.1 s), PEFT's own rules say which of its modules are adapted, and one
line of arithmetic for each method does the rest.

Letters: `L` layers, `d` width, `r` rank, `n` virtual tokens, `h` encoder width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from transformers import PretrainedConfig

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

    The method is a key of `METHODS`, or a PEFT config, of which a copy is returned.

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

    The last few are kept, as a slider asks for the same one many times.

    Raises:
        ValueError: a task other than PEFT's `"CAUSAL_LM"` (also None) and `"SEQ_CLS"`.
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


def _numel(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# --- which modules a method adapts -----------------------------------------------


def target_modules(
    model: torch.nn.Module, config: PeftConfig
) -> list[tuple[str, torch.nn.Module]]:
    """Find (name, module) of each base module that a PEFT config adapts.

    Raises:
        ValueError: no module matches, or PEFT has no default for this model type.
    """
    targets = config.target_modules
    if targets is None:
        kind = config.peft_type.value + "_TARGET"
        targets = _default_targets(kind, model.config.model_type)
    matches = _matching(model, config, targets)
    if not matches:
        raise ValueError(f"no module matches target_modules={targets!r}")
    return matches


def _matching(
    model: torch.nn.Module, config: PeftConfig, targets: Any
) -> list[tuple[str, torch.nn.Module]]:
    """The modules that PEFT would adapt if `targets` were the config's own."""
    from peft.tuners import tuners_utils

    config = copy.copy(config)
    config.target_modules = targets
    config = tuners_utils._maybe_include_all_linear_layers(config, model)
    return [
        (name, module)
        for name, module in model.named_modules()
        if name and tuners_utils.check_target_module_exists(config, name)
    ]


def _default_targets(kind: str, model_type: str) -> list[str]:
    """PEFT's own choice of modules, such as q_proj and v_proj for LoRA on Llama."""
    from peft.utils import constants

    table = getattr(constants, f"TRANSFORMERS_MODELS_TO_{kind}_MODULES_MAPPING")
    if model_type not in table:
        raise ValueError(f"PEFT has no default for {model_type}: name target_modules")
    return table[model_type]


def lora_target_names(model: torch.nn.Module) -> list[str]:
    """Short names of all linear layers but the output head: what to give LoRA.

    This is the list that `target_modules="all-linear"` finds, on plain, 4-bit and 8-bit
    models that have no adapters yet: sorted, such as `["down_proj", ..., "v_proj"]`.
    """
    from peft import LoraConfig

    # the task leaves out a classifier's head, too
    config = LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
    return sorted({name.split(".")[-1] for name, _ in target_modules(model, config)})


def features(name: str, module: torch.nn.Module) -> tuple[int, int]:
    """Input and output width of a Linear, an Embedding or GPT-2's Conv1D.

    Raises:
        ValueError: for another kind of module, which has no formula.
    """
    kind = type(module).__name__
    if kind == "Conv1D":
        return tuple(module.weight.shape)
    if kind == "Embedding":
        return module.num_embeddings, module.embedding_dim
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    raise ValueError(f"no formula for {name}, a {kind}: choose linear layers")


def lora_rank(name: str, config: PeftConfig) -> int:
    """The rank of one module's adapter: `r`, unless `rank_pattern` has another."""
    from peft.utils.other import get_pattern_key

    patterns = config.rank_pattern
    return patterns.get(get_pattern_key(patterns.keys(), name), config.r)


# --- how many parameters a method trains -----------------------------------------

# LoraConfig's fields that add or change parameters in ways not counted here.
_NOT_COUNTED = (
    *("layer_replication", "target_parameters", "trainable_token_indices"),
    *("use_qalora", "use_bdlora", "arrow_config", "kasa_config"),
    *("monteclora_config", "velora_config"),
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


def _saved_modules(model: torch.nn.Module, config: PeftConfig) -> int:
    """Parameters of the trained copies of `modules_to_save` and of a classifier."""
    names = _saved_names(model, config)
    return sum(_numel(model.get_submodule(name)) for name in names)


def _lora(model: torch.nn.Module, config: PeftConfig) -> int:
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
        saved = _saved_names(model, config)
        total += sum(
            p.numel()
            for n, p in model.named_parameters()
            if n.endswith("bias") and not any(n.startswith(f"{s}.") for s in saved)
        )
    return total


def _ia3(model: torch.nn.Module, config: PeftConfig) -> int:
    ends = config.feedforward_modules
    if ends is None:
        ends = _default_targets("IA3_FEEDFORWARD", model.config.model_type)
    feedforward = {name for name, _ in _matching(model, config, ends)}
    # one factor per output; per input where the module is a feedforward one
    return sum(
        features(name, module)[0 if name in feedforward else 1]
        for name, module in target_modules(model, config)
    )


def _virtual_tokens(config: PeftConfig) -> int:
    if not config.num_virtual_tokens:
        raise ValueError(f"{config.peft_type.value} needs num_virtual_tokens=")
    return config.num_virtual_tokens * (config.num_transformer_submodules or 1)


def _width(model: torch.nn.Module, config: PeftConfig) -> int:
    return config.token_dim or model.config.get_text_config().hidden_size


def _prompt_tuning(model: torch.nn.Module, config: PeftConfig) -> int:
    return _virtual_tokens(config) * _width(model, config)


def _prefix_tuning(model: torch.nn.Module, config: PeftConfig) -> int:
    base = model.config.get_text_config()
    n, width = _virtual_tokens(config), _width(model, config)
    layers = config.num_layers or base.num_hidden_layers
    kv_heads = getattr(base, "num_key_value_heads", None)
    if kv_heads:
        heads = config.num_attention_heads or base.num_attention_heads
        width = (getattr(base, "head_dim", None) or width // heads) * kv_heads
    if not config.prefix_projection:
        return n * layers * 2 * width  # keys and values
    h = config.encoder_hidden_size or width
    return n * width + (width * h + h) + (h + 1) * layers * 2 * width


def _p_tuning(model: torch.nn.Module, config: PeftConfig) -> int:
    n, d = _virtual_tokens(config), _width(model, config)
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


# PEFT's type of a method -> its count, from the model without weights and the config
_FORMULAS: dict[str, Callable[[torch.nn.Module, PeftConfig], int]] = {
    "LORA": _lora,
    "IA3": _ia3,
    "PROMPT_TUNING": _prompt_tuning,
    "PREFIX_TUNING": _prefix_tuning,
    "P_TUNING": _p_tuning,
}


def _formula(config: PeftConfig) -> Callable[[torch.nn.Module, PeftConfig], int]:
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind not in _FORMULAS:
        raise ValueError(f"no formula for {kind}; there is one for {list(_FORMULAS)}")
    return _FORMULAS[kind]


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
        return _numel(skeleton(config))
    method = peft_config(method, **options)
    model = skeleton(config, method.task_type)
    return _formula(method)(model, method) + _saved_modules(model, method)


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
        method: as in `adapter_parameters`; `"full"` gives the whole model.
        dtype: what is stored. PEFT keeps adapters in float32, whatever the base is.

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

    itemsize = getattr(torch, dtype).itemsize
    if method == "full":
        return itemsize * adapter_parameters(config, "full", **options)
    method = peft_config(method, **options)
    model, formula = skeleton(config, method.task_type), _formula(method)
    if formula is _p_tuning:
        formula = _prompt_tuning
    elif formula is _prefix_tuning:
        method.prefix_projection = False
    stored = formula(model, method) + _saved_modules(model, method)
    if formula is _lora:
        names = {name.split(".")[-1] for name, _ in target_modules(model, method)}
        if "embed_tokens" in names:
            stored += _numel(model.get_input_embeddings())
        if "lm_head" in names:
            stored += _numel(model.get_output_embeddings())
    return itemsize * stored


# --- a model in memory -----------------------------------------------------------


def _elements(parameter: torch.nn.Parameter) -> int:
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


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has. Printed, it reads as PEFT's own line.

    Attributes:
        total: all parameters, tied ones once.
        trainable: those that training changes (`requires_grad`).
        frozen, trainable_percent: the rest, and the trained share from 0 to 100.
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
        return self.total - self.trainable

    @property
    def trainable_percent(self) -> float:
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

    Examples:
        >>> import torch
        >>> print(count_parameters(torch.nn.Linear(3, 2)))
        trainable params: 8 || all params: 8 || trainable%: 100.0000
    """
    total = trainable = 0
    for parameter in model.parameters():
        total += _elements(parameter)
        trainable += _elements(parameter) if parameter.requires_grad else 0
    tensors = {id(tensor): tensor for tensor in model.parameters()}
    for module in model.modules():
        tensors |= {id(tensor): tensor for tensor in _constants(module)}
    held = sum(t.numel() * t.element_size() for t in tensors.values() if t is not None)
    return ParameterCount(total, trainable, held)
