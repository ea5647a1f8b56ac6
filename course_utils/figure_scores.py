"""Figures that compare methods by their scores. `plotting` offers them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from course_utils.figure_own import plot_own_points
from course_utils.figure_style import display_name, finish, line_styles, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _seeds(value: Any) -> list[float]:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Sequence):
        if not value:
            raise ValueError("there are no scores to draw")
        return [math.nan if v is None else float(v) for v in value]
    return [math.nan if value is None else float(value)]


def plot_comparison(
    scores: Mapping[str, Any],
    *,
    xlabel: str = "exact match (%)",
    percent: bool = True,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Draw one bar a method, its value written beside it.

    Args:
        scores: {label: score, or the scores of several seeds}. Of several, the bar is
            the mean, each seed a dot, and the line spans the smallest to the largest.
        xlabel: what is compared, with its unit.
        percent: scores are 0 to 1 and shown in per cent.
        ax: axes to draw in; None opens a figure.
        title: of the figure.
    """
    ax = new_axes(ax)
    scale = 100.0 if percent else 1.0
    styles = line_styles(scores)
    ends = []
    for row, (label, value) in enumerate(scores.items()):
        values = [scale * v for v in _seeds(value)]
        mean, low, high = sum(values) / len(values), min(values), max(values)
        ax.barh(row, mean, color=styles[label]["color"], height=0.62, alpha=0.85)
        text = f"{mean:.0f} %" if percent else f"{mean:,.3g}"
        if len(values) > 1:
            ax.plot([low, high], [row, row], color="white", linewidth=3)
            ax.plot([low, high], [row, row], color="black", linewidth=1.2)
            ax.plot(values, [row] * len(values), "o", color="white", markersize=3.5,
                    markeredgecolor="black", markeredgewidth=0.8)  # fmt: skip
            text += f" ({low:.0f} to {high:.0f})" if percent else ""
        ax.annotate(text, (max(high, 0), row), xytext=(5, 0), fontsize=8,
                    textcoords="offset points", va="center")  # fmt: skip
        ends.append(high)
    ax.set_yticks(range(len(scores)), [display_name(label) for label in scores])
    spare = max(4 - len(scores), 0) / 2  # two bars are no thicker than four
    ax.set_ylim(len(scores) - 0.4 + spare, -0.6 - spare)
    ax.grid(False, axis="y")
    ax.set_xlim(0, 100 * 1.18 if percent else max(ends) * 1.25 or 1)
    if percent:
        ax.set_xticks(range(0, 101, 20))
    return finish(ax, xlabel=xlabel, title=title)


def plot_by_slice(
    scores: Mapping[str, Mapping[str, float]],
    *,
    xlabel: str = "exact match (%)",
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Draw the score of each method on each slice of the data, one row a slice.

    Args:
        scores: {method: {slice: score, 0 to 1}}.
        xlabel: what is scored, with its unit.
        ax: axes to draw in; None opens a figure.
        title: of the figure.
    """
    ax = new_axes(ax)
    slices = list(dict.fromkeys(s for by_slice in scores.values() for s in by_slice))
    styles = line_styles(scores)
    lift = 0.5 / max(len(scores), 1)  # methods stand a little apart, top to bottom
    for turn, (label, by_slice) in enumerate(scores.items()):
        style = styles[label] | {"linestyle": ""}
        shift = lift * (turn - (len(scores) - 1) / 2)
        rows = [slices.index(s) + shift for s in by_slice]
        values = [100 * value for value in by_slice.values()]
        name = display_name(label)
        ax.plot(values, rows, markersize=6, clip_on=False, zorder=3, label=name,
                **style)  # fmt: skip
    names = [str(s).replace("_", " ") for s in slices]
    ax.set_yticks(range(len(slices)), names)
    ax.set_ylim(len(slices) - 0.5, -0.5)
    ax.set_yticks([row + 0.5 for row in range(len(slices) - 1)], minor=True)
    ax.grid(False, axis="y")
    ax.grid(True, axis="y", which="minor", color="#999999", linewidth=0.6)
    ax.tick_params(axis="y", which="minor", length=0)
    ax.set_xlim(-2, 102)
    return finish(
        ax,
        xlabel=xlabel,
        title=title,
        legend=True,
        loc="center left",
        bbox_to_anchor=(1.01, 0.5),
        handlelength=1.2,
    )


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Labels of the points that no other beats: cheaper and no worse, from the left.

    Args:
        points: {label: (cost, score)}; less cost and more score are better.

    Examples:
        >>> pareto_front({"a": (1, 0.5), "b": (2, 0.4), "c": (3, 0.9)})
        ['a', 'c']
    """
    front: list[str] = []
    best = float("-inf")
    for label in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if points[label][1] > best:
            front.append(label)
            best = points[label][1]
    return front


def plot_scatter(
    points: Mapping[str, tuple[float, float]],
    *,
    xlabel: str,
    ylabel: str = "exact match (%)",
    percent: bool = True,
    log: bool = False,
    own: Mapping[str, tuple[float, float]] | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Draw score against cost; a step line joins the points that no other beats.

    Args:
        points: {label: (cost, score)}.
        xlabel: the cost, with its unit.
        ylabel: the score, with its unit.
        percent: scores are 0 to 1 and shown in per cent.
        log: logarithmic cost axis; costs of 0 are then an error.
        own: {label: (cost, score)} of the reader, laid over as `plot_own_points` does.
        ax: axes to draw in; None opens a figure.
        title: of the figure.

    Raises:
        ValueError: a cost is not positive on a logarithmic axis.
    """
    if log and any(cost <= 0 for cost, _ in points.values()):
        raise ValueError("a logarithmic axis has no place for costs of 0 or less")
    ax = new_axes(ax)
    scale = 100.0 if percent else 1.0
    front = pareto_front(points)
    ax.plot([points[name][0] for name in front],
            [scale * points[name][1] for name in front], drawstyle="steps-post",
            color="#999999", linewidth=1.2, zorder=1, label="not beaten")  # fmt: skip
    for label, style in line_styles(points).items():
        cost, score = points[label]
        style |= {"linestyle": ""}
        if label not in front and style["marker"] != "X":
            style["markerfacecolor"] = "white"
        ax.plot(cost, scale * score, markersize=7, zorder=3, **style)
    if log:
        ax.set_xscale("log")
    ax.margins(0.12, 0.15)
    plot_own_points(ax, own or {}, recorded=points, percent=percent)
    finish(ax, xlabel=xlabel, ylabel=ylabel, title=title, legend=True)
    drawn = [(c, scale * s) for c, s in (own or {}).values()]
    place_labels(
        ax,
        {display_name(k): (c, scale * s) for k, (c, s) in points.items()},
        others=drawn,
    )
    return ax


def place_labels(
    ax: Axes,
    points: Mapping[str, tuple[float, float]],
    *,
    radii: Mapping[str, float] | None = None,
    others: Sequence[tuple[float, float]] = (),
) -> None:
    """Write each label beside its point, where it covers no other label or point.

    Args:
        ax: the axes, drawn and with its legend.
        points: {label: (x, y)}.
        radii: {label: of its marker, in points}; None takes 5 for all.
        others: points that labels keep clear of.
    """
    from matplotlib.transforms import Bbox

    figure = ax.figure
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    dot = figure.dpi / 72
    sizes = [(radii or {}).get(label, 5.0) for label in points]
    sizes += [5.0] * len(others)
    taken = []
    for point, radius in zip([*points.values(), *others], sizes, strict=True):
        (x, y), half = ax.transData.transform(point), radius * dot
        taken.append(Bbox.from_extents(x - half, y - half, x + half, y + half))
    if ax.get_legend():
        taken.append(ax.get_legend().get_window_extent(renderer))
    offsets = [(8, 0), (-8, 0), (0, 9), (0, -9), (7, 8), (7, -8), (-7, 8), (-7, -8)]
    offsets += [(0, 20), (0, -20), (10, 18), (10, -18), (-10, 18), (-10, -18)]
    leader = {"arrowstyle": "-", "linewidth": 0.6, "color": "#777777"}
    for (label, point), radius in zip(points.items(), sizes, strict=False):
        for away in offsets:
            dx, dy = (part * max(radius / 5, 0.8) for part in away)
            text = ax.annotate(
                label,
                point,
                xytext=(dx, dy),
                textcoords="offset points",
                fontsize=8,
                ha="left" if dx > 0 else "right" if dx < 0 else "center",
                va="center" if dy == 0 else "bottom" if dy > 0 else "top",
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
                zorder=2,
                arrowprops=leader if away in offsets[4:] else None,
            )
            box = text.get_window_extent(renderer)
            inside = ax.bbox.x0 <= box.x0 and box.x1 <= ax.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            if away != offsets[-1]:
                text.remove()
        taken.append(box)


def plot_learning_rates(
    scores: Mapping[str, Mapping[float, Any]],
    *,
    ylabel: str = "exact match (%)",
    percent: bool = True,
    higher_is_better: bool = True,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Draw score against learning rate: mean over seeds, band from least to greatest.

    The best learning rate of each method carries a ring.

    Args:
        scores: {method: {learning rate: scores of the seeds}}; None or NaN for a run
            that broke, which leaves a gap.
        ylabel: what is scored, with its unit.
        percent: scores are 0 to 1 and shown in per cent.
        higher_is_better: False for a loss.
        ax: axes to draw in; None opens a figure.
        title: of the figure.
    """
    ax = new_axes(ax)
    scale = 100.0 if percent else 1.0
    for label, style in line_styles(scores).items():
        rates = sorted(scores[label])
        seeds = [[scale * v for v in _seeds(scores[label][rate])] for rate in rates]
        means = [sum(values) / len(values) for values in seeds]
        ax.plot(rates, means, linewidth=1.5, markersize=5, label=display_name(label),
                **style)  # fmt: skip
        ax.fill_between(rates, [min(v) for v in seeds], [max(v) for v in seeds],
                        color=style["color"], alpha=0.15, linewidth=0)  # fmt: skip
        finite = [i for i, mean in enumerate(means) if math.isfinite(mean)]
        if not finite:
            continue
        best = (max if higher_is_better else min)(finite, key=means.__getitem__)
        ax.plot(rates[best], means[best], "o", markersize=12, markerfacecolor="none",
                markeredgecolor=style["color"], markeredgewidth=1.5)  # fmt: skip
    ax.set_xscale("log")
    if percent:
        ax.set_ylim(-3, 103)
    return finish(ax, xlabel="learning rate", ylabel=ylabel, title=title)
