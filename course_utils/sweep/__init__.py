"""The comparison of methods in lesson 8: its experiments, its results, your own data.

`experiment` says what is trained and trains it; `results` reads what the recorded runs
found, and makes the comparison on other data and another model.
"""

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
    long_runs,
    methods_table,
    recorded_methods,
)
