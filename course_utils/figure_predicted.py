"""Predicted against measured: one point a case, and the line where they agree."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from course_utils.figure_style import (
    METHOD_COLOURS,
    METHOD_STYLES,
    display_name,
    finish,
    method_of,
    new_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_predicted(
    points: Mapping[str, tuple[float, float]],
    *,
    unit: str = "GiB",
    band: float = 0.1,
    hollow: Collection[str] = (),
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Draw what was measured above what was predicted, on logarithmic axes.

    Args:
        points: {label: (predicted, measured)}; a label begins with its method.
        unit: of both.
        band: a grey band shows where measured is within this share of predicted.
        hollow: labels whose points are not filled.
        ax: axes to draw in; None opens a figure.
        title: of the figure.

    Raises:
        ValueError: there are no points, or one has no place on a logarithmic axis.
    """
    values = [value for pair in points.values() for value in pair]
    if not values or min(values) <= 0:
        raise ValueError("predicted against measured needs points above 0")
    ax = new_axes(ax)
    ends = [min(values) / 1.25, max(values) * 1.25]
    below, above = ([end * (1 + side * band) for end in ends] for side in (-1, 1))
    look = {"color": "#dddddd", "linewidth": 0, "zorder": 1}
    ax.fill_between(ends, below, above, label=f"within {band:.0%}", **look)
    ax.plot(ends, ends, color="#777777", linewidth=1, zorder=2)
    named = set()
    for label, (predicted, measured) in points.items():
        method = method_of(label)
        colour = METHOD_COLOURS.get(method, "#555555")
        marker = METHOD_STYLES.get(method, {"marker": "o"})["marker"]
        name = display_name(method) if method else "other"
        ax.plot(predicted, measured, linestyle="", marker=marker, color=colour,
                markersize=6, zorder=3,
                markerfacecolor="white" if label in hollow else colour,
                label=None if name in named or label in hollow else name)  # fmt: skip
        if label not in hollow:
            named.add(name)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set_xlim(ends)
    ax.set_ylim(ends)
    finish(
        ax,
        xlabel=f"predicted ({unit})",
        ylabel=f"measured ({unit})",
        title=title,
        legend=True,
        loc="lower right",
        handlelength=1.5,
    )
    return ax
