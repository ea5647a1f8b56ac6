"""Tests and hints of the exercises in lesson 05."""

from __future__ import annotations

from course_utils.exercises import exercise


@exercise("5.1", hint="One row has as many numbers as the model is wide, 4 bytes each.")
def _(answer):
    return answer == 100 * 4096 * 4


@exercise("5.2", hint="`pad(x, (left, right), value=...)`: which side, which label?")
def _(answer, *, labels, n):
    import torch

    behind = torch.full_like(labels[:, :1], -100).expand(-1, n)
    return torch.equal(answer, torch.cat([labels, behind], dim=1))


@exercise("5.3", hint="`rows.flip(0)` turns the order round; the rest is as above.")
def _(answer, *, model, rows, batch, with_soft_prompt):
    import math

    import torch

    with torch.no_grad():
        loss = model(**with_soft_prompt(model, rows.flip(0), batch)).loss.item()
    return math.isclose(answer, loss, rel_tol=1e-4)
