"""Count parameters: of a model in memory, module by module, or before it exists.

`count_parameters` and `parameter_table` look at a model; `adapter_parameters`,
`adapter_bytes` and `predict_parameters` need only its configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from course_utils.closed_forms import adapter_bytes, adapter_parameters
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


def _module_bytes(module: torch.nn.Module, seen: set[int]) -> int:
    """Bytes held by one module itself, skipping tensors that are in `seen`."""
    tensors = [*module._parameters.values(), *_constants(module)]
    total = 0
    for tensor in tensors:
        if tensor is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            total += tensor.numel() * tensor.element_size()
    return total


def count_parameters(model: torch.nn.Module) -> ParameterCount:
    """Count a model's parameters and the bytes that hold them.

    Tied weights count once. A bitsandbytes 4-bit weight counts its logical elements,
    and its bytes include the scales (`absmax`). Buffers are not parameters. The counts
    agree with PEFT's `get_nb_trainable_parameters`. A model on the meta device is
    counted as if it were filled.

    Args:
        model: any torch module, PEFT models included.

    Examples:
        >>> import torch
        >>> print(count_parameters(torch.nn.Linear(3, 2)))
        trainable params: 8 || all params: 8 || trainable%: 100.0000
    """
    total = trainable = 0
    for parameter in model.parameters():
        elements = _elements(parameter)
        total += elements
        trainable += elements if parameter.requires_grad else 0
    seen: set[int] = set()
    held = sum(_module_bytes(module, seen) for module in model.modules())
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
        method: as in `adapter_parameters`, `"full"` included.
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

    Returns:
        Sorted names, such as `["down_proj", ..., "v_proj"]`.
    """
    return sorted({name.split(".")[-1] for name in linear_names(model)})


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
        row[2] += sum(map(_elements, fresh))
        row[3] += sum(_elements(p) for p in fresh if p.requires_grad)
        row[4] += _module_bytes(module, weighed)
    rows = []
    for (name, shape, _), (numbers, *figures) in groups.items():
        for seen in numbers:
            name = name.replace("[#]", f"[{_ranges(seen)}]", 1)
        rows.append(ParameterRow(name or "(model)", shape, *figures))
    return ParameterTable(tuple(rows))
