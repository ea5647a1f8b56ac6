"""Tests and hints of the exercises in lesson 07."""

from __future__ import annotations

import math
import operator

from course_utils.exercises import exercise


@exercise("7.1", hint="8 bits for each block, and 32 more for 256 blocks.")
def _(answer):
    return math.isclose(answer, 4 + 8 / 128 + 32 / (128 * 256), abs_tol=5e-4)


@exercise("7.2", hint="Which weights did the adapter see while it was trained?")
def _(answer, *, four_bit, state, A, B, scale):
    import torch
    from bitsandbytes.functional import dequantize_4bit

    wanted = dequantize_4bit(four_bit, state) + scale * B @ A
    return answer.shape == wanted.shape and torch.allclose(answer, wanted, atol=1e-5)


@exercise("7.3", hint="Try batch_size 8, then 12, and look at plan.fits('T4').")
def _(answer, *, recipe):
    from course_utils.memory import t4_plan

    def fits(batch_size):
        plan = t4_plan(
            "llama-2-7b",
            "qlora",
            batch_size=batch_size,
            sequence_length=1024,
            gradient_checkpointing=True,
            double_quant=False,
            **recipe,
        )
        return plan.fits("T4")

    answer = operator.index(answer)
    return fits(answer) and not fits(answer + 1)
