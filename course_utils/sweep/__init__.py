"""Lesson 8's comparison of methods: experiments, results, the same on your own data."""

from course_utils.sweep.experiment import (
    BUDGET,
    LORA,
    PROMPT,
    Experiment,
    best_of,
    grid,
    low_rank,
    neighbour,
    other_methods,
    run_experiment,
)
from course_utils.sweep.results import (
    agreement,
    compare_on,
    methods_table,
    recorded_methods,
)
