"""Every figure of the course: arrays in, `Axes` out.

Each function draws in `ax`, or in a new figure of 6 x 3.2 inches, and returns the
axes; `ax.set_title` writes a title. A method has the same colour, line style and
marker in all of them, and every figure reads in grey. No display is needed.
"""

from course_utils.plotting.methods import pareto_front, plot_rate_panels, plot_scatter
from course_utils.plotting.runs import (
    plot_by_slice,
    plot_comparison,
    plot_confusion,
    plot_learning_rates,
    plot_loss,
    plot_memory,
    plot_spectrum,
)
from course_utils.plotting.style import finish, line_styles, new_axes
from course_utils.plotting.tokens import plot_attention_mask, plot_mask
