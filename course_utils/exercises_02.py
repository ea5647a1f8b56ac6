"""Tests and hints of the exercises in lesson 02."""

from __future__ import annotations

import math

from course_utils.lessons import exercise


@exercise("2.1", hint="In the first step, what are m_hat and v_hat of one gradient?")
def _(answer):
    big, small = answer
    return math.isclose(big, 1e-4, rel_tol=0.01) and math.isclose(
        small, 1e-4, rel_tol=0.01
    )


@exercise("2.2", hint="Go back to sums over tokens, then divide once by all tokens.")
def _(answer, *, means, tokens):
    total = sum(m * n for m, n in zip(means, tokens, strict=True))
    return math.isclose(answer, total / sum(tokens), rel_tol=1e-6)


@exercise("2.3", hint="Count what is kept for each parameter: how many numbers of 4?")
def _(answer):
    return math.isclose(answer, 6_738_415_616 * 16 / 1e9, rel_tol=0.01)


@exercise("2.4", hint="Try sizes between the two that are printed.")
def _(answer, *, peak_gib):
    batch = int(answer)
    return answer == batch and peak_gib(batch) <= 14 < peak_gib(batch + 1)
