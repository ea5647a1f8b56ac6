"""What a recorded run does to its model's weights, beside training them."""

from __future__ import annotations

from typing import Any


def weight_of(model: Any, name: str) -> Any:
    """A parameter by its name in the base model, detached.

    Args:
        model: a causal LM, or a PEFT model around one.
        name: as `get_parameter` takes it.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_parameter(name).detach()


def singular_values(matrix: Any) -> list[float]:
    """From the greatest down, to six digits.

    Args:
        matrix: (rows, columns).
    """
    import torch

    values = torch.linalg.svdvals(matrix.float().cpu())  # MPS has none
    return [float(f"{value:.6g}") for value in values.tolist()]


def to_dtype(model: Any, dtype: Any) -> None:
    """Cast to 16 bits to generate with; a PEFT model's adapters stay in float32.

    Args:
        model: changed in place.
        dtype: of the weights afterwards.
    """
    adapted = hasattr(model, "peft_config")
    for parameter in model.parameters():
        trained = adapted and parameter.requires_grad
        if parameter.is_floating_point() and not trained:  # 4-bit weights are bytes
            parameter.data = parameter.data.to(dtype)
