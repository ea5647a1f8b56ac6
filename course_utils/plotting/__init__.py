"""Every figure of the course: arrays in, `Axes` out.

Each function draws in `ax`, or in a new figure of 6 x 3.2 inches, and returns the
axes. A method has the same colour, line style and marker in all of them, and every
figure reads in grey. No display is needed.
"""

from __future__ import annotations

from course_utils.plotting.methods import plot_rate_panels, plot_trade_off
from course_utils.plotting.runs import (
    pareto_front,
    plot_by_slice,
    plot_comparison,
    plot_confusion,
    plot_learning_rates,
    plot_loss,
    plot_memory,
    plot_own_points,
    plot_predicted,
    plot_scatter,
    plot_spectrum,
)
from course_utils.plotting.style import (
    METHOD_COLOURS,
    METHOD_NAMES,
    METHOD_STYLES,
    display_name,
    finish,
    line_styles,
    method_of,
    new_axes,
)
from course_utils.plotting.tokens import (
    plot_attention_mask,
    plot_mask,
    plot_method_map,
    plot_prefix,
)

__all__ = [
    "METHOD_COLOURS",
    "METHOD_NAMES",
    "METHOD_STYLES",
    "display_name",
    "finish",
    "line_styles",
    "method_of",
    "new_axes",
    "pareto_front",
    "plot_attention_mask",
    "plot_by_slice",
    "plot_comparison",
    "plot_confusion",
    "plot_learning_rates",
    "plot_loss",
    "plot_mask",
    "plot_memory",
    "plot_method_map",
    "plot_own_points",
    "plot_predicted",
    "plot_prefix",
    "plot_rate_panels",
    "plot_scatter",
    "plot_spectrum",
    "plot_trade_off",
]
