"""A reader's own points over a figure of recorded ones. `plotting` offers it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from course_utils.figure_style import line_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWN_COLOUR = "#e3001b"  # no method has it


def plot_own_points(
    ax: Axes,
    points: Mapping[str, tuple[float, float]],
    *,
    recorded: Mapping[str, tuple[float, float]] | None = None,
    percent: bool = True,
    label: str = "yours",
) -> Axes:
    """Lay a reader's points over a figure: open markers with a red edge.

    Args:
        ax: the figure's axes; its legend, if it has one, names the new points.
        points: {method: (x, y)}; a method has the marker it has elsewhere.
        recorded: {method: (x, y)}: a dotted line joins a point with its recorded one.
        percent: y is 0 to 1 and shown in per cent.
        label: the legend's name for all of them.
    """
    scale = 100.0 if percent else 1.0
    styles = line_styles({**(recorded or {}), **points})
    for name, (x, y) in points.items():
        if name in (recorded or {}):
            x0, y0 = recorded[name]
            ax.plot([x, x0], [scale * y, scale * y0], color=OWN_COLOUR, zorder=2,
                    linewidth=0.9, linestyle=":")  # fmt: skip
        for width, colour in ((3.4, "white"), (1.7, OWN_COLOUR)):  # a white rim
            ax.plot(x, scale * y, marker=styles[name]["marker"], markersize=9,
                    linestyle="", markerfacecolor="none", markeredgecolor=colour,
                    markeredgewidth=width, zorder=4)  # fmt: skip
    if points:
        ax.plot([], [], "o", markersize=8, markerfacecolor="none", label=label,
                markeredgecolor=OWN_COLOUR, markeredgewidth=1.7)  # fmt: skip
        if legend := ax.get_legend():
            # As it was chosen; matplotlib has no public names for that.
            from matplotlib.transforms import IdentityTransform

            place = {"loc": legend._loc, "ncols": legend._ncols}
            if legend._bbox_to_anchor is not None:
                place["bbox_to_anchor"] = legend._bbox_to_anchor
                place["bbox_transform"] = IdentityTransform()
            ax.legend(fontsize=8, frameon=False, **place)
    return ax
