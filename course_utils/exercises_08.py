"""Tests and hints of the exercises in lesson 08."""

from __future__ import annotations

import math

from course_utils.lessons import exercise


@exercise("8.1", hint="Set the standard error to 0.01, and solve for n.")
def _(answer):
    return math.isclose(answer, 0.25 / 0.01**2, abs_tol=0.5)


@exercise("8.2", hint="Walk from the cheapest up, and keep each new best score.")
def _(answer, *, points):
    from course_utils.plotting import pareto_front

    return len(answer) == len(set(answer)) and set(answer) == set(pareto_front(points))


@exercise("8.3", hint="If the lowest loss is at an edge, go one rate further.")
def _(answer, *, losses):
    from course_utils.sweep import best_of, neighbour

    return math.isclose(answer, neighbour(best_of(losses), -1), rel_tol=0.01)
