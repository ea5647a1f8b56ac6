"""Which class is taken for which. `plotting` offers it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from course_utils.figure_style import finish, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_confusion(
    matrix: Any,
    names: Sequence[str],
    *,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Draw a confusion matrix: counts, darker for a greater share of the row.

    Args:
        matrix: (classes, classes) counts; a row is the true class.
        names: of the classes, in the order of rows and columns.
        ax: axes to draw in; None opens a figure.
        title: of the figure.

    Raises:
        ValueError: the matrix has not one row and one column a name.
    """
    import numpy as np

    counts = np.asarray(matrix, dtype=float)
    if counts.shape != (len(names), len(names)):
        raise ValueError(f"{len(names)} names for a matrix {counts.shape}")
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    ax = new_axes(ax)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row in range(len(names)):
        for column in range(len(names)):
            dark = share[row, column] > 0.5
            text = f"{counts[row, column]:.0f}\n{100 * share[row, column]:.0f} %"
            ax.annotate(
                text,
                (column, row),
                ha="center",
                va="center",
                fontsize=9,
                color="white" if dark else "black",
                weight="bold" if row == column else "normal",
            )
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names)
    ax.grid(False)
    return finish(ax, xlabel="predicted", ylabel="true", title=title)
