"""Figures of many methods: learning rates, trade-offs. `plotting` offers them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from course_utils.plotting.runs import OWN_COLOUR, pareto_front, place_labels
from course_utils.plotting.style import (
    HEIGHT,
    WIDTH,
    display_name,
    finish,
    line_styles,
    new_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 4
# Bytes and the marker's size in points, of what is to be kept for each task.
_SIZES = {"keeps nothing": 0, "100 kB": 1e5, "10 MB": 1e7, "500 MB": 5e8}


def plot_rate_panels(
    values: Mapping[str, Mapping[float, float | None]],
    *,
    own: Mapping[str, tuple[float, float]] | None = None,
    ylabel: str = "validation loss (nats per token)",
    percent: bool = False,
    higher_is_better: bool = False,
    title: str | None = None,
) -> list[Axes]:
    """Draw loss or score against learning rate, one small panel a method.

    All panels share the vertical axis, logarithmic for a loss, which ends at three
    times the worst method's best loss; what lies above, or is no number, is a cross at
    the upper edge. The best rate of each method carries a ring and stands over its
    panel.

    Args:
        values: {method: {learning rate: value, or None where it is not a number}}.
        own: {method: (learning rate, value)}, open markers with a red edge.
        ylabel: what the values are, with their unit.
        percent: values are 0 to 1 and shown in per cent.
        higher_is_better: False for a loss.
        title: of the figure.

    Returns:
        The axes of the panels, one a method.

    Raises:
        ValueError: there is no method, or a method has no rate.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not values or not all(values.values()):
        raise ValueError("there is no method, or one without a rate, to draw")
    scale, sign = (100.0 if percent else 1.0), (-1 if higher_is_better else 1)
    best = {}
    for name, rates in values.items():
        known = {rate: v for rate, v in rates.items() if v is not None}
        if known:
            best[name] = min(sorted(known), key=lambda r, of=known: sign * of[r])
    ends = [scale * values[name][rate] for name, rate in best.items()] or [1.0]
    low, top = (-3.0, 103.0) if percent else (min(ends) / 1.3, 3 * max(ends))
    columns = min(_COLUMNS, len(values))
    rows = math.ceil(len(values) / columns)
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(WIDTH, min(0.55 + 1.15 * rows, 4.6) if rows > 1 else 2.4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    panels = list(grid.flat)
    for ax in panels[len(values) :]:
        ax.remove()
    panels = panels[: len(values)]
    for ax, (name, style) in zip(panels, line_styles(values).items(), strict=True):
        rates = sorted(values[name])
        shown = [values[name][rate] for rate in rates]
        heights = [math.inf if v is None else scale * v for v in shown]
        over = [rate for rate, h in zip(rates, heights, strict=True) if h > top]
        inside = [h if h <= top else math.nan for h in heights]
        new_axes(ax)
        ax.plot(rates, inside, linewidth=1.3, markersize=4, **style)
        if over:  # an empty line that is not clipped would upset the layout
            ax.plot(over, [top] * len(over), "x", color=style["color"], markersize=5,
                    clip_on=False)  # fmt: skip
        if name in best:
            ax.plot(best[name], scale * values[name][best[name]], "o", markersize=9,
                    markerfacecolor="none", markeredgecolor=style["color"])  # fmt: skip
        told = f"best {best[name]:.2g}" if name in best else "no loss is a number"
        ax.set_title(f"{display_name(name)}\n{told}", fontsize=7.5)
        ax.set_xscale("log")
        if name in (own or {}):
            rate, value = own[name]
            ax.plot(rate, min(scale * value, top), marker=style["marker"],
                    markersize=8, markerfacecolor="none", markeredgecolor=OWN_COLOUR,
                    markeredgewidth=1.7, zorder=4, clip_on=False,
                    linestyle="")  # fmt: skip
        ax.margins(x=0.18)
        ax.xaxis.set_major_locator(LogLocator(numticks=4))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.tick_params(labelsize=7)
        if not percent:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=8))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_ylim(low, top)
    figure.supxlabel("learning rate", fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    if own:
        title = f"{title or ''} (red: yours)".strip()
    if title:
        figure.suptitle(title, fontsize=9.5, x=0.01, ha="left")
    return panels


def unbeaten(points: Mapping[str, tuple[float, float, float]]) -> list[str]:
    """Labels of the points that no other equals or betters in all three.

    Args:
        points: {label: (cost, score, size)}; less cost, more score, less size.

    >>> unbeaten({"a": (1, 0.5, 9), "b": (2, 0.5, 9), "c": (3, 0.4, 1)})
    ['a', 'c']
    """

    def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return a != b and a[0] <= b[0] and a[1] >= b[1] and a[2] <= b[2]

    return [
        label
        for label, point in points.items()
        if not any(beats(other, point) for other in points.values())
    ]


def _marker_size(size: float) -> float:
    """Points across: 4 up to 1 kB, and 2.2 more for each factor of ten above."""
    return 4 + 2.2 * max(math.log10(max(size, 1) / 1e3), 0)


def plot_trade_off(
    points: Mapping[str, tuple[float, float, float]],
    *,
    xlabel: str = "training (seconds)",
    ylabel: str = "exact match (%)",
    percent: bool = True,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Draw quality against compute; a marker's size is what each task has to keep.

    Filled markers are beaten by no other method in all three at once. The step line
    joins those that are beaten by none in compute and quality alone.

    Args:
        points: {method: (seconds, score, bytes kept for each task)}.
        xlabel: the cost, with its unit.
        ylabel: the score, with its unit.
        percent: scores are 0 to 1 and shown in per cent.
        ax: axes to draw in; None opens a figure.
        title: of the figure.
    """
    ax = new_axes(ax, height=1.25 * HEIGHT)
    scale = 100.0 if percent else 1.0
    flat = {name: (cost, scale * score) for name, (cost, score, _) in points.items()}
    front = [flat[name] for name in pareto_front(flat)]
    ax.plot(*zip(*front, strict=True), drawstyle="steps-post", color="#999999",
            linewidth=1.2, zorder=1, label="not beaten in these two")  # fmt: skip
    whole = unbeaten(points)
    for name, style in line_styles(points).items():
        look: dict[str, Any] = {
            "markersize": _marker_size(points[name][2]),
            "zorder": 3,
        }
        if name not in whole:
            look["markerfacecolor"] = "white"
        ax.plot(*flat[name], **style | look | {"linestyle": "", "marker": "o"})
    for name, size in _SIZES.items():
        ax.plot([], [], "o", color="#999999", markersize=_marker_size(size), label=name)
    ax.margins(0.14, 0.15)
    finish(ax, xlabel=xlabel, ylabel=ylabel, title=title)
    ax.legend(
        fontsize=8,
        frameon=False,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.17),
        ncols=len(_SIZES) + 1,
        columnspacing=1.2,
        handletextpad=0.6,
    )
    place_labels(
        ax,
        {display_name(name): point for name, point in flat.items()},
        radii={display_name(n): _marker_size(p[2]) / 2 for n, p in points.items()},
    )
    return ax
