"""A model's parameters row by row, equal layers in one row, with their true bytes.

`parameters` offers `parameter_table`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


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
