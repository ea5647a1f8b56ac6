"""Which modules a PEFT config adapts, and their shapes, without any weights.

The shapes come from a model built on torch's meta device, which holds no weights: 7B
takes 0.1 s. The matching follows PEFT's rules, written out, so that `closed_forms` can
count from a configuration alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
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
