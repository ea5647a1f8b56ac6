"""Count parameters: of a model in memory, module by module, or before it exists.

`count_parameters` and `parameter_table` look at a model; `adapter_parameters`,
`adapter_bytes` and `predict_parameters` need only its configuration.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from course_utils.closed_forms import adapter_bytes, adapter_parameters
from course_utils.parameter_rows import (
    ParameterRow,
    ParameterTable,
    elements,
    module_bytes,
    parameter_table,
)
from course_utils.targets import linear_names, peft_config, skeleton

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
