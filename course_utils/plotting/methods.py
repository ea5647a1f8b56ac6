"""Figures that weigh many methods: panels of learning rates, scores against costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from operator import le
from typing import TYPE_CHECKING, Any

from course_utils.plotting.style import (
    HEIGHT,
    WIDTH,
    display_name,
    finish,
    legend_below,
    line_styles,
    new_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OWN_COLOUR = "#e3001b"  # no method has it
_TURNS = 32  # places that are tried for a label
# Bytes, whose markers a legend shows.
_SIZES = {"keeps nothing": 0, "100 kB": 1e5, "10 MB": 1e7, "500 MB": 5e8}


def plot_rate_panels(
    losses: Mapping[str, Mapping[float, float | None]],
    *,
    own: Mapping[str, tuple[float, float]] | None = None,
    ylabel: str = "validation loss (nats per token)",
) -> list[Axes]:
    """Draw loss against learning rate, one small panel a method.

    `losses` are {method: {learning rate: loss, None where it is not a number}}; `own`
    are {method: (learning rate, loss)} of the reader, markers with a red edge.
    All share the vertical axis, which ends at three times the worst method's best loss;
    what lies above, or is None, is a cross at the upper edge. The best rate of each
    method carries a ring and stands over its panel.
    Raises ValueError: there is no method, or a method has no rate.
    """
    import matplotlib.pyplot as plt

    if not losses or not all(losses.values()):
        raise ValueError("there is no method, or one without a rate, to draw")
    losses = {
        name: {r: math.inf if y is None else y for r, y in sorted(by_rate.items())}
        for name, by_rate in losses.items()
    }
    best = {n: min((y, r) for r, y in by.items()) for n, by in losses.items()}
    bests = [loss for loss, _ in best.values() if loss < math.inf] or [1.0]
    limits = (min(bests) / 1.3, 3 * max(bests))
    columns = min(4, len(losses))
    rows = math.ceil(len(losses) / columns)
    size = (WIDTH, min(0.55 + 1.15 * rows, 4.6) if rows > 1 else 2.4)
    shared: dict[str, Any] = {"sharey": True, "squeeze": False, "figsize": size}
    figure, grid = plt.subplots(rows, columns, layout="constrained", **shared)
    panels = list(grid.flat[: len(losses)])
    for ax in grid.flat[len(losses) :]:
        ax.remove()
    for ax, (name, style) in zip(panels, line_styles(losses).items(), strict=True):
        _draw_rates(ax, losses[name], limits, style)
        loss, rate = best[name]
        text = "no loss is a number"
        if loss < math.inf:
            text = f"best {rate:.2g}"
            ring = {"markeredgecolor": style["color"], "markerfacecolor": "none"}
            ax.plot(rate, loss, "o", markersize=12, **ring)
        ax.set_title(f"{display_name(name)}\n{text}", fontsize=7.5)
        if name in (own or {}):
            rate, loss = own[name]
            look = {"marker": style["marker"], "markeredgecolor": _OWN_COLOUR}
            look |= {"markerfacecolor": "none", "markeredgewidth": 1.7, "markersize": 8}
            ax.plot(rate, min(loss, limits[1]), clip_on=False, zorder=4, **look)
    figure.supxlabel("learning rate", fontsize=9)
    figure.supylabel(ylabel, fontsize=9)
    if own:
        figure.suptitle("(red: yours)", fontsize=9.5, x=0.01, ha="left")
    return panels


def _draw_rates(ax: Axes, losses: Mapping, limits: tuple, style: Mapping) -> None:
    """One panel: the curve, and crosses for what is off the scale."""
    from matplotlib.ticker import LogLocator, NullFormatter

    new_axes(ax)
    inside = [loss if loss <= limits[1] else math.nan for loss in losses.values()]
    ax.plot(list(losses), inside, linewidth=1.3, markersize=4, **style)
    off_scale = [rate for rate, loss in losses.items() if loss > limits[1]]
    if off_scale:  # an empty line that is not clipped would upset the layout
        look = {"color": style["color"], "markersize": 5, "clip_on": False}
        ax.plot(off_scale, [limits[1]] * len(off_scale), "x", **look)
    ax.set(xscale="log", yscale="log", ylim=limits)
    ax.margins(x=0.18)
    ax.tick_params(labelsize=7)
    ax.xaxis.set_major_locator(LogLocator(numticks=4))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=8))
    ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


def pareto_front(points: Mapping[str, tuple[float, ...]]) -> list[str]:
    """Labels of the points (cost, score) that no other beats, from the cheapest up.

    Less cost and more score are better; more costs may stand behind the score.

    >>> pareto_front({"a": (1, 0.5), "b": (2, 0.4), "c": (3, 0.9)})
    ['a', 'c']
    """
    costs = {label: (x, -score, *rest) for label, (x, score, *rest) in points.items()}
    front: list[str] = []
    for label in sorted(costs, key=costs.get):  # what beats a point comes before it
        if not any(all(map(le, costs[other], costs[label])) for other in front):
            front.append(label)
    return front


def plot_scatter(
    points: Mapping[str, tuple[float, ...]],
    *,
    xlabel: str,
    log: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw {method: (cost, score from 0 to 1)}, or (cost, score, bytes kept).

    A step line joins what none beats in cost and score. A marker is filled where none
    is better in everything given; its size is the bytes, where there are any.
    Raises ValueError: a cost is not positive on a logarithmic axis.
    """
    if log and any(cost <= 0 for cost, *_ in points.values()):
        raise ValueError("a logarithmic axis has no place for costs of 0 or less")
    sized = any(len(point) > 2 for point in points.values())
    ax = new_axes(ax, height=1.25 * HEIGHT if sized else HEIGHT)
    places = {name: (x, 100 * score) for name, (x, score, *_) in points.items()}
    sizes = {name: _marker_size(*kept) for name, (_, _, *kept) in points.items()}
    front = zip(*(places[name] for name in pareto_front(places)), strict=True)
    look = {"color": "#999999", "linewidth": 1.2, "zorder": 1}
    ax.plot(*front, drawstyle="steps-post", label="not beaten in these two", **look)
    unbeaten = pareto_front(points)
    for name, style in line_styles(points).items():
        style |= {"linestyle": "", "markersize": sizes[name], "zorder": 3}
        style |= {"marker": "o"} if sized else {}
        style |= {} if name in unbeaten else {"markerfacecolor": "white"}
        ax.plot(*places[name], **style)
    for text, kept in _SIZES.items() if sized else ():
        dot = {"color": "#999999", "markersize": _marker_size(kept)}
        ax.plot([], [], "o", label=text, **dot)
    if log:
        ax.set_xscale("log")
    ax.margins(0.14, 0.15)
    finish(ax, xlabel=xlabel, ylabel="exact match (%)", legend=False)
    legend_below(ax, ncols=len(_SIZES) + 1, columnspacing=1.2, handletextpad=0.6)
    _place_labels(ax, places, {name: size / 2 for name, size in sizes.items()})
    return ax


def _marker_size(kept: float = 1e5) -> float:
    """Points across: 4 up to 1 kB, and 2.2 more for each factor of ten above."""
    return 4 + 2.2 * max(math.log10(max(kept, 1) / 1e3), 0)


def _place_labels(
    ax: Axes, points: Mapping[str, tuple[float, float]], radii: Mapping[str, float]
) -> None:
    """Write each label near its point, where it covers no other label or point.

    `ax` holds all it shall hold; `radii` are of the markers, in points.
    """
    from matplotlib.transforms import Bbox

    ax.figure.draw_without_rendering()  # lays the axes out
    taken = []
    for name, point in points.items():
        (x, y), half = ax.transData.transform(point), radii[name] * ax.figure.dpi / 72
        taken.append(Bbox.from_extents(x - half, y - half, x + half, y + half))
    look = {"textcoords": "offset points", "fontsize": 8, "zorder": 2}
    look["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    line = {"arrowstyle": "-", "linewidth": 0.6, "color": "#777777"}
    for name, point in points.items():
        for turn in range(_TURNS):  # right, up, left, down, between; then further out
            angle = math.pi / 2 * (turn % 4 + turn // 4 % 2 / 2)
            away = radii[name] + 4 + 9 * (turn // 8)
            dx, dy = away * math.cos(angle), away * math.sin(angle)
            look["ha"] = "left" if dx > 1 else "right" if dx < -1 else "center"
            look["va"] = "bottom" if dy > 1 else "top" if dy < -1 else "center"
            look["arrowprops"] = line if turn > 7 else None
            text = ax.annotate(display_name(name), point, (dx, dy), **look)
            box = text.get_window_extent()
            inside = ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            if turn + 1 < _TURNS:
                text.remove()
        taken.append(box)
