"""Count parameters: of a model in memory, or of a method before any model exists.

`adapter_parameters` and `adapter_bytes` need only a configuration: a model of that
shape is built on torch's meta device, which holds no weights (7B takes half a second),
and PEFT itself puts the adapters on it.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
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

    Raises ValueError: the method is unknown, or options come with a PEFT config;
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
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "FEATURE_EXTRACTION": "AutoModel",
}
_skeletons: dict[str, Module] = {}
_counts: dict[str, tuple[int, int]] = {}


def _key(config: PretrainedConfig, task_type: Any, **options: Any) -> str:
    task = getattr(task_type, "value", task_type) or "CAUSAL_LM"
    fields = config.to_json_string(use_diff=False)  # it lacks num_labels
    return f"{task} {options} {config.num_labels} {fields}"


def skeleton(config: PretrainedConfig, task_type: Any = None, **options: Any) -> Module:
    """Build the model of a configuration without weights, on the meta device.

    The last few are kept: copy what you change. `task_type` is PEFT's, None a causal
    language model; `options` are those of transformers' `from_config`.

    Raises ValueError: transformers builds no such model from this configuration.
    """
    key = _key(config, task_type, **options)
    if key not in _skeletons:
        import torch
        import transformers

        auto_class = _AUTO_CLASSES[key.split()[0]]
        config = copy.deepcopy(config)
        config.name_or_path = ""  # or PEFT asks the hub about it
        vars(config).pop("quantization_config", None)
        build = getattr(transformers, auto_class).from_config
        try:
            with torch.device("meta"):
                model = build(config, **options)
        except Exception as error:  # of whatever class: each family has its own
            where = f"{auto_class} builds no {config.model_type!r}: {reason_of(error)}"
            advice = "complete the configuration, or choose another task_type"
            raise ValueError(f"{where}; {advice}") from error
        if len(_skeletons) > 15:
            _skeletons.clear()
        _skeletons[key] = model
    return _skeletons[key]


def reason_of(error: Exception) -> str:
    """The first line of a library's error."""
    return (str(error).strip(" .\n") or type(error).__name__).splitlines()[0][:300]


def attach(model: Module, config: PeftConfig) -> PeftModel:
    """Wrap a copy of a model on the meta device; both arguments stay as they were.

    Raises ValueError: PEFT cannot adapt this model; its reason, and what to do.
    """
    import torch
    from peft import get_peft_model

    config = copy.deepcopy(config)
    config.task_type, config.inference_mode = config.task_type or "CAUSAL_LM", False
    kind = config.peft_type.value
    if config.is_prompt_learning and not config.num_virtual_tokens:
        raise ValueError(f"{kind} needs num_virtual_tokens=<a number>")
    if hasattr(config, "prompt_tuning_init"):
        config.prompt_tuning_init = "RANDOM"  # other starts read a tokenizer
    # Where PEFT needs numbers, the second round gives it adapters that have some.
    for place in (torch.device("meta"), contextlib.nullcontext()):
        try:
            with place, warnings.catch_warnings(action="ignore"):
                return get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
        except Exception as error:  # of whatever class: each method has its own
            reason = error
            if not isinstance(error, RuntimeError):
                break
    advice = "choose other options or another method"
    if "target" in str(reason):
        advice = f"choose target_modules among {', '.join(lora_target_names(model))}"
    where = f"PEFT puts no {kind} on {model.config.model_type!r}"
    raise ValueError(f"{where}: {reason_of(reason)}; {advice}") from reason


def lora_target_names(model: Module) -> list[str]:
    """Short names of all linear layers but the output head, sorted: what to give LoRA.

    They are what `target_modules="all-linear"` finds on plain, 4-bit and 8-bit models,
    as long as they must be to match nothing else. Experts that transformers has fused
    go by the names that their layers had before (`gate_proj`): PEFT takes those.
    """
    from peft import LoraConfig
    from peft.tuners import tuners_utils
    from peft.utils import transformers_weight_conversion as fused

    # the task leaves out a classifier's head, too
    config = LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
    found = tuners_utils._maybe_include_all_linear_layers(config, model).target_modules
    family = fused._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type)
    experts = fused._MOE_TARGET_MODULE_MAPPING.get(family, {})
    others = [name for name, _ in model.named_modules() if name not in found]
    return sorted(tuners_utils._find_minimal_target_modules(found, others) | {*experts})


def _count(config: PretrainedConfig, method: PeftConfig) -> tuple[int, int]:
    """Elements that are trained, and elements in the saved file."""
    key = f"{_key(config, method.task_type)} {method.to_dict()}"
    if key not in _counts:
        import torch
        from peft import get_peft_model_state_dict

        model = attach(skeleton(config, method.task_type), method)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        # PEFT moves virtual tokens to the CPU, which has no place for those of meta
        stay = patch.object(torch.Tensor, "cpu", lambda tensor: tensor)
        with stay, warnings.catch_warnings(action="ignore"):
            file = get_peft_model_state_dict(model)
        if len(_counts) > 1000:
            _counts.clear()
        _counts[key] = trained, sum(tensor.numel() for tensor in file.values())
    return _counts[key]


def adapter_parameters(config: PretrainedConfig, method: Method, **options: Any) -> int:
    """Count what a method trains, as `print_trainable_parameters`, without weights.

    PEFT itself wraps a model of that shape; the lessons derive its count by formula.
    The method is `"full"`, a key of `METHODS` or any PEFT config; options are PEFT's
    fields, with PEFT's defaults.

    Raises ValueError: unknown method, or PEFT cannot adapt this model so: its reason;
    TypeError: PEFT has no option of that name.

    >>> from transformers import LlamaConfig
    >>> adapter_parameters(LlamaConfig(), "lora", r=64)  # Llama-2-7B, q and v
    33554432
    """
    if method == "full":
        if options:
            raise ValueError(f"full fine-tuning takes no options: {options}")
        return sum(parameter.numel() for parameter in skeleton(config).parameters())
    return _count(config, peft_config(method, **options))[0]


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
    return itemsize * _count(config, peft_config(method, **options))[1]


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
        counts = f"trainable params: {self.trainable:,} || all params: {self.total:,}"
        return f"{counts} || trainable%: {self.trainable_percent:.4f}"


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
