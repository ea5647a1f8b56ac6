"""Tests and hints of the exercises in lesson 03."""

from __future__ import annotations

from course_utils.lessons import exercise


@exercise("3.1", hint="A and B of each target: r * d_in and d_out * r, in each layer.")
def _(answer, *, config):
    from course_utils.parameters import adapter_parameters

    options = {"r": 16, "target_modules": ["q_proj", "v_proj"]}
    return answer == adapter_parameters(config, "lora", **options)


@exercise("3.2", hint="B A has the shape of W; how often does it count?")
def _(answer, *, W, A, B, alpha, r):
    import torch

    return torch.allclose(answer, W + alpha / r * (B @ A), rtol=1e-5, atol=1e-6)


@exercise("3.3", hint="Layer 2 is `layers.2.`, layer 20 is `layers.20.`: mind the dot.")
def _(answer, *, names):
    import re

    parts = [name.split(".") for name in names]
    wanted = [
        ".".join(part)
        for part in parts
        if int(part[part.index("layers") + 1]) >= 20
        and part[-1] in ("q_proj", "v_proj")
    ]
    return [name for name in names if re.fullmatch(answer, name)] == wanted


@exercise("3.4", hint="4 bytes for each parameter: how many are there with this rank?")
def _(answer, *, r_64_bytes):
    return answer == r_64_bytes // 4
