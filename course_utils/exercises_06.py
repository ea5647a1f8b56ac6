"""Tests and hints of the exercises in lesson 06."""

from __future__ import annotations

import math

from course_utils.lessons import exercise


@exercise("6.1", hint="Keys and values, of 8 heads, each as wide as one of 32 heads.")
def _(answer):
    return answer == 20 * 2 * 16 * 8 * (2048 // 32)


@exercise("6.2", hint="A prefix is (L, 2, H_kv, n, d_head): which one counts tokens?")
def _(answer, *, whole):
    import torch

    return answer.shape == whole.shape and torch.equal(answer, whole)


@exercise("6.3", hint="Softmax: each score 0 has the weight e to the power of 0.")
def _(answer):
    return math.isclose(answer, 1 / 33, rel_tol=1e-3)


@exercise("6.4", hint="Right ones of a row, divided by the sum of that row.")
def _(answer, *, matrix):
    wanted = [row[i] / sum(row) for i, row in enumerate(matrix)]
    return len(answer) == len(wanted) and all(
        math.isclose(a, b, abs_tol=1e-6) for a, b in zip(answer, wanted, strict=True)
    )
