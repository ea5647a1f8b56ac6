"""Figures that compare methods by their scores. `plotting` offers them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from course_utils.plotting.style import (
    METHOD_COLOURS,
    METHOD_STYLES,
    display_name,
    finish,
    legend_below,
    line_styles,
    method_of,
    new_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# --- figure_curves ---
# Figures of runs and models: loss, spectrum, memory. `plotting` offers them.

UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "MiB": 2**20, "GiB": 2**30}
PART_HATCHES = ["", "//", "..", "\\\\", "xx", "--", "++", "oo"]
PART_COLOURS = [
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
    "#b3b3b3",
    "#6a3d9a",
]


def _curves(run: Any) -> tuple[list, list, list, list]:
    """Steps, loss, validation steps and validation loss of whatever holds a run."""
    if isinstance(run, Mapping):
        loss = list(run.get("loss", []))
        pairs = list(run.get("eval_loss") or [])
        steps = list(run.get("steps") or range(1, len(loss) + 1))
        return steps, loss, [p[0] for p in pairs], [p[1] for p in pairs]
    if hasattr(run, "loss"):
        return (
            list(run.steps),
            list(run.loss),
            list(getattr(run, "eval_steps", [])),
            list(getattr(run, "eval_loss", [])),
        )
    loss = [float(value) for value in run]
    return list(range(1, len(loss) + 1)), loss, [], []


def _labelled(runs: Any) -> dict[str, Any]:
    if isinstance(runs, Mapping) and "loss" not in runs:
        return dict(runs)
    return {"": runs}


def plot_loss(
    runs: Any,
    *,
    recorded: Any = None,
    ax: Axes | None = None,
    title: str | None = None,
    ylabel: str = "loss (nats per token)",
    log: bool = False,
) -> Axes:
    """Draw loss against optimiser steps: training as lines, validation as markers.

    Args:
        runs: a history with `.steps .loss .eval_steps .eval_loss`, a recorded run (a
            dict with `"loss"`), a sequence of losses, or {label: any of these}.
        recorded: the same, drawn paler behind: runs made before.
        ax: axes to draw in; None opens a figure.
        title: of the figure.
        ylabel: what the loss is, with its unit.
        log: logarithmic loss axis.

    Raises:
        ValueError: there is no loss to draw.
    """
    ax = new_axes(ax)
    live, old = _labelled(runs), _labelled({} if recorded is None else recorded)
    styles = line_styles(dict.fromkeys([*live, *old]))
    validated = False
    for group, pale in ((old, True), (live, False)):
        for label, run in group.items():
            steps, loss, eval_steps, eval_loss = _curves(run)
            if not len(loss) and not len(eval_loss):
                raise ValueError(f"there is no loss to draw in run {label!r}")
            style = dict(styles[label])
            marker = style.pop("marker")
            colour = style["color"]
            if pale:
                style |= {"alpha": 0.4, "linewidth": 1.0}
            name = display_name(label) + (" (recorded)" if pale and label else "")
            if len(loss):
                text = name or ("recorded" if pale else "training")
                ax.plot(steps, loss, label=text, **{"linewidth": 1.5} | style)
            if len(eval_loss):
                ax.plot(
                    eval_steps,
                    eval_loss,
                    color="white" if not pale else colour,
                    linestyle="",
                    marker=marker,
                    markersize=6,
                    markeredgecolor=colour,
                    markeredgewidth=1.4,
                    alpha=0.4 if pale else 1.0,
                )
                validated = True
    if validated:
        ax.plot([], [], color="white", linestyle="", marker="o", markersize=6,
                markeredgecolor="#444444", markeredgewidth=1.4,
                label="validation (markers)")  # fmt: skip
    if log:
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    return finish(ax, xlabel="optimiser step", ylabel=ylabel, title=title)


def plot_spectrum(
    spectra: Mapping[str, Any] | Any,
    *,
    energy: bool = False,
    rank: int | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Draw singular values from the largest to the smallest.

    Args:
        spectra: singular values (n,), or {label: singular values}.
        energy: draw instead the share of the squared sum that the first k values
            hold, in per cent.
        rank: marked with a vertical line.
        ax: axes to draw in; None opens a figure.
        title: of the figure.
    """
    import numpy as np

    ax = new_axes(ax)
    if not isinstance(spectra, Mapping):
        spectra = {"": spectra}
    for label, style in line_styles(spectra).items():
        values = np.sort(np.asarray(spectra[label], dtype=float).ravel())[::-1]
        if energy:
            values = 100 * np.cumsum(values**2) / np.sum(values**2)
        every = max(len(values) // 8, 1)
        ax.plot(np.arange(1, len(values) + 1), values, markevery=every, linewidth=1.4,
                markersize=4, label=display_name(label), **style)  # fmt: skip
    if energy:
        ax.set_ylim(0, 103)
    else:
        ax.set_yscale("log")
    if rank is not None:
        ax.axvline(rank, color="black", linewidth=1, linestyle="--")
        ax.annotate(f"r = {rank}", (rank, 0.97), xycoords=("data", "axes fraction"),
                    xytext=(5, 0), textcoords="offset points", fontsize=8, va="top",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                    zorder=4)  # fmt: skip
    ylabel = "share of squared sum (%)" if energy else "singular value"
    return finish(ax, xlabel="number of the singular value", ylabel=ylabel, title=title)


def plot_memory(
    parts: Mapping[str, Any],
    *,
    limit: float | None = None,
    limit_name: str = "limit",
    unit: str = "GiB",
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Draw stacked bars of bytes, part by part.

    Args:
        parts: {part: bytes}, or {label: {part: bytes}} for several bars.
        limit: bytes; a dashed line.
        limit_name: what the line is, such as "T4".
        unit: `"GiB"`, `"GB"`, `"MiB"`, `"MB"`, `"kB"` or `"B"`.
        ax: axes to draw in; None opens a figure.
        title: of the figure.

    Raises:
        ValueError: the unit is unknown.
    """
    if unit not in UNITS:
        raise ValueError(f"unit {unit!r} is none of {', '.join(UNITS)}")
    several = any(isinstance(value, Mapping) for value in parts.values())
    bars = dict(parts) if several else {"": parts}
    size = UNITS[unit]
    ax = new_axes(ax)
    names = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    totals = []
    for row, bar in enumerate(bars.values()):
        left = 0.0
        for turn, part in enumerate(names):
            width = bar.get(part, 0) / size
            ax.barh(row, width, left=left, height=0.6, edgecolor="white", linewidth=0.6,
                    color=PART_COLOURS[turn % 8], hatch=PART_HATCHES[turn % 8],
                    label=part.replace("_", " ") if row == 0 else None)  # fmt: skip
            left += width
        totals.append(left)
        ax.annotate(f"{left:.3g} {unit}", (left, row), xytext=(4, 0), va="center",
                    textcoords="offset points", fontsize=8,
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                    zorder=4)  # fmt: skip
    longest = max(totals)
    if limit is not None:
        line = limit / size
        longest = max(longest, line)
        ax.axvline(line, color="black", linestyle="--", linewidth=1.2)
        ax.annotate(f"{limit_name}: {line:.3g} {unit}", (line, 1.01), fontsize=8,
                    xycoords=("data", "axes fraction"), ha="center")  # fmt: skip
    names_of_bars = [display_name(label) for label in bars]
    ax.set_yticks(range(len(bars)) if several else [], names_of_bars * several)
    spare = max(3 - len(bars), 0) / 2  # one bar is no thicker than three
    ax.set_ylim(len(bars) - 0.4 + spare, -0.6 - spare)
    ax.grid(False, axis="y")
    ax.set_xlim(0, longest * 1.2 or 1)
    finish(ax, xlabel=f"memory ({unit})", title=title, legend=False)
    if title and limit is not None:  # above the name of the line
        ax.set_title(title, fontsize=9.5, loc="left", pad=16)
    legend_below(ax, 0.45, ncols=min(len(names), 4), handlelength=1.8)
    return ax


# --- figure_confusion ---
# Which class is taken for which. `plotting` offers it.


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


# --- figure_predicted ---
# Predicted against measured: one point a case, and the line where they agree.


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


# --- figure_own ---
# A reader's own points over a figure of recorded ones. `plotting` offers it.

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
