"""Tests and hints of the exercises in lesson 04."""

from __future__ import annotations

import operator

from course_utils.lessons import exercise


@exercise("4.1", hint="Count A and B only; their shapes are those of LoRA.")
def _(answer):
    return answer == 8 * (1536 + 576)


@exercise("4.2", hint="The last r columns of U and rows of Vh; each side takes a root.")
def _(answer, *, weight, r):
    import torch

    A, B = answer
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    wanted = U[:, -r:] @ torch.diag(S[-r:]) @ Vh[-r:]
    shapes = A.shape == (r, weight.shape[1]) and B.shape == (weight.shape[0], r)
    return shapes and torch.allclose(B @ A, wanted, atol=1e-3 * wanted.abs().max())


@exercise("4.3", hint="Raise the rank until held(...) first reaches 0.9.")
def _(answer, *, singular_values):
    squares = singular_values**2

    def held(rank):
        return (squares[:rank].sum() / squares.sum()).item()

    answer = operator.index(answer)  # a tensor of one whole number, too
    return held(answer) >= 0.9 > held(answer - 1)
