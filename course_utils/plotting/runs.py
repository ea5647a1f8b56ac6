"""Figures of runs: loss, memory, weights and scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from course_utils.plotting.style import (
    display_name,
    finish,
    legend_below,
    line_styles,
    new_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GIB = 2**30
# Of the parts of memory, in turn; the hatches tell them apart in grey.
_PART_LOOKS = [
    *(("#0072b2", ""), ("#e69f00", "//"), ("#009e73", ".."), ("#cc79a7", "\\\\")),
    *(("#56b4e9", "xx"), ("#d55e00", "--"), ("#b3b3b3", "++"), ("#6a3d9a", "oo")),
]
_MARKS = {"linestyle": "", "markersize": 6, "markeredgewidth": 1.4}  # of validation
# Of a text a little to the right of its place.
_BESIDE: dict[str, Any] = {"xytext": (5, 0), "textcoords": "offset points"}
_BESIDE |= {"fontsize": 8, "zorder": 4}
_BESIDE["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 1}


def plot_loss(
    runs: Any,
    *,
    recorded: Any = None,
    ylabel: str = "loss (nats per token)",
    log: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw loss against optimiser steps: training as lines, validation as markers.

    `runs` are a history with `.steps .loss .eval_steps .eval_loss`, a recorded run (a
    dict with `"loss"`), a sequence of losses, or {label: any of these}; `recorded` are
    the same, of runs made before, which are drawn paler behind.
    Raises ValueError: there is no loss to draw.
    """
    ax = new_axes(ax)
    live, old = _labelled(runs), _labelled({} if recorded is None else recorded)
    styles = line_styles([*live, *old])
    for group, pale in ((old, True), (live, False)):
        for label, run in group.items():
            _draw_run(ax, run, label, styles[label], pale)
    if any(len(_curves(run)[3]) for run in [*live.values(), *old.values()]):
        look = _MARKS | {"markerfacecolor": "white", "markeredgecolor": "#444444"}
        ax.plot([], [], marker="o", label="validation (markers)", **look)
    if log:
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)
    ax.xaxis.get_major_locator().set_params(integer=True)
    return finish(ax, xlabel="optimiser step", ylabel=ylabel)


def _curves(run: Any) -> tuple[Sequence, Sequence, Sequence, Sequence]:
    """Steps, loss, validation steps and validation loss of whatever holds a run."""
    if hasattr(run, "loss"):
        return run.steps, run.loss, run.eval_steps, run.eval_loss
    if not isinstance(run, Mapping):
        run = {"loss": [float(value) for value in run]}
    loss, pairs = run.get("loss", []), run.get("eval_loss") or []
    steps = run.get("steps") or range(1, len(loss) + 1)
    return steps, loss, [step for step, _ in pairs], [value for _, value in pairs]


def _labelled(runs: Any) -> Mapping[str, Any]:
    return runs if isinstance(runs, Mapping) and "loss" not in runs else {"": runs}


def _draw_run(ax: Axes, run: Any, label: str, style: Mapping, pale: bool) -> None:
    steps, loss, eval_steps, eval_loss = _curves(run)
    if not len(loss) and not len(eval_loss):
        raise ValueError(f"there is no loss to draw in run {label!r}")
    look = {"color": style["color"], "alpha": 0.4 if pale else None}
    if len(loss):
        name = display_name(label) or ("" if pale else "training")
        name = f"{name} (recorded)" if pale and name else name or "recorded"
        line = {"linestyle": style["linestyle"], "linewidth": 1.0 if pale else 1.5}
        ax.plot(steps, loss, label=name, **look | line)
    if len(eval_loss):
        edge = {"marker": style["marker"], "markeredgecolor": style["color"]}
        edge["markerfacecolor"] = style["color"] if pale else "white"
        ax.plot(eval_steps, eval_loss, **look | _MARKS | edge)


def plot_spectrum(
    spectra: Mapping[str, Any],
    *,
    energy: bool = False,
    rank: int | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw {label: singular values (n,)} from the largest to the smallest.

    With `energy`, draw instead what per cent of the squared sum the first k values
    hold. A vertical line marks `rank`.
    """
    import numpy as np

    ax = new_axes(ax)
    for label, style in line_styles(spectra).items():
        values = np.sort(np.asarray(spectra[label], dtype=float))[::-1]
        if energy:
            values = 100 * np.cumsum(values**2) / np.sum(values**2)
        look = {"markevery": max(len(values) // 8, 1), "linewidth": 1.4, **style}
        ranks = np.arange(1, len(values) + 1)
        ax.plot(ranks, values, markersize=4, label=display_name(label), **look)
    if energy:
        ax.set_ylim(0, 103)
    else:
        ax.set_yscale("log")
    if rank is not None:
        ax.axvline(rank, color="black", linewidth=1, linestyle="--")
        place = {"xycoords": ("data", "axes fraction"), "va": "top"}
        ax.annotate(f"r = {rank}", (rank, 0.97), **place | _BESIDE)
    ylabel = "share of squared sum (%)" if energy else "singular value"
    return finish(ax, xlabel="number of the singular value", ylabel=ylabel)


def plot_memory(
    parts: Mapping[str, Any],
    *,
    limit: float | None = None,
    limit_name: str = "limit",
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Draw stacked bars of {part: bytes}, or of {label: {part: bytes}}, in GiB.

    `limit`, in bytes, is a dashed line, called `limit_name`, such as "T4".
    """
    several = any(isinstance(value, Mapping) for value in parts.values())
    bars = parts if several else {"": parts}
    ax = new_axes(ax)
    names = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    ends = []
    for row, bar in enumerate(bars.values()):
        left = 0.0
        for part, (colour, hatch) in zip(names, cycle(_PART_LOOKS), strict=False):
            look = {"color": colour, "hatch": hatch, "edgecolor": "white"}
            label = part.replace("_", " ") if row == 0 else None
            width = bar.get(part, 0) / _GIB
            ax.barh(row, width, 0.6, left, linewidth=0.6, label=label, **look)
            left += width
        ends.append(left)
        ax.annotate(f"{left:.3g} GiB", (left, row), va="center", **_BESIDE)
    if limit is not None:
        ends.append(limit / _GIB)
        ax.axvline(ends[-1], color="black", linestyle="--", linewidth=1.2)
        place = {"xycoords": ("data", "axes fraction"), "ha": "center", "fontsize": 8}
        ax.annotate(f"{limit_name}: {ends[-1]:.3g} GiB", (ends[-1], 1.01), **place)
    _rows(ax, [display_name(label) for label in bars], least=3)
    if not several:
        ax.set_yticks([])
    ax.set_xlim(0, max(ends) * 1.2)
    finish(ax, xlabel="memory (GiB)", legend=False)
    pad = None if limit is None else 16  # above the name of the line
    ax.set_title(title, fontsize=9.5, loc="left", pad=pad)
    legend_below(ax, ncols=min(len(names), 4), handlelength=1.8)
    return ax


def plot_confusion(
    matrix: Any, names: Sequence[str], *, ax: Axes | None = None
) -> Axes:
    """Draw a confusion matrix: counts, darker for a greater share of the row.

    `matrix` holds counts, a row for each true class, in the order of `names`.
    Raises ValueError: the matrix has not one row and one column a name.
    """
    import numpy as np

    counts = np.asarray(matrix, dtype=float)
    if counts.shape != (len(names), len(names)):
        raise ValueError(f"{len(names)} names for a matrix {counts.shape}")
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    ax = new_axes(ax)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        text = f"{counts[row, column]:.0f}\n{100 * share:.0f} %"
        look = {"color": "white" if share > 0.5 else "black", "fontsize": 9}
        look["weight"] = "bold" if row == column else "normal"
        ax.annotate(text, (column, row), ha="center", va="center", **look)
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names)
    ax.grid(False)
    return finish(ax, xlabel="predicted", ylabel="true")


def _scores(seeds: Any, percent: bool) -> list[float]:
    """The scores to draw of one seed or several, NaN for a run that broke."""
    values = seeds if isinstance(seeds, Sequence) else [seeds]
    if not values:
        raise ValueError("there are no scores to draw")
    scale = 100 if percent else 1
    return [math.nan if value is None else scale * float(value) for value in values]


def plot_comparison(
    scores: Mapping[str, Any],
    *,
    xlabel: str = "exact match (%)",
    percent: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """Draw one bar a method: {label: score, or the scores of several seeds}.

    Of several, the bar is the mean, each seed a dot, and a line joins the dots. With
    `percent`, scores are 0 to 1 and shown in per cent. The axis ends with the data.
    """
    ax = new_axes(ax)
    ends = []
    for row, (label, style) in enumerate(line_styles(scores).items()):
        values = _scores(scores[label], percent)
        mean, low, high = sum(values) / len(values), min(values), max(values)
        ax.barh(row, mean, color=style["color"], height=0.62, alpha=0.85)
        text = f"{mean:.0f} %" if percent else f"{mean:,.2f}"
        if len(values) > 1:
            rows = [row] * len(values)
            dots = {"markersize": 3.5, "markerfacecolor": "white"}
            ax.plot(values, rows, color="white", linewidth=3)
            ax.plot(values, rows, "o-", color="black", linewidth=1.2, **dots)
            text += f" ({low:.0f} to {high:.0f})" if percent else ""
        ax.annotate(text, (max(high, 0), row), va="center", **_BESIDE)
        ends.append(high)
    _rows(ax, [display_name(label) for label in scores], least=4)
    most = max(ends) * 1.25 or 1
    ax.set_xlim(0, min(max(most, 12), 118) if percent else most)
    return finish(ax, xlabel=xlabel)


def plot_by_slice(
    scores: Mapping[str, Mapping[str, float]],
    *,
    xlabel: str = "exact match (%)",
    ax: Axes | None = None,
) -> Axes:
    """Draw scores from 0 to 1, {method: {slice: score}}, one row a slice."""
    ax = new_axes(ax)
    slices = list(dict.fromkeys(s for by_slice in scores.values() for s in by_slice))
    lift = 0.5 / max(len(scores), 1)  # methods stand a little apart, top to bottom
    for turn, (label, style) in enumerate(line_styles(scores).items()):
        shift = lift * (turn - (len(scores) - 1) / 2)
        rows = [slices.index(name) + shift for name in scores[label]]
        values = [100 * value for value in scores[label].values()]
        look = style | {"linestyle": "", "markersize": 6, "clip_on": False}
        ax.plot(values, rows, zorder=3, label=display_name(label), **look)
    _rows(ax, [str(name).replace("_", " ") for name in slices])
    ax.set_yticks([row + 0.5 for row in range(len(slices) - 1)], minor=True)
    ax.grid(True, axis="y", which="minor", color="#999999", linewidth=0.6)
    ax.tick_params(axis="y", which="minor", length=0)
    ax.set_xlim(-2, 102)
    beside = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "handlelength": 1.2}
    return finish(ax, xlabel=xlabel, legend=True, **beside)


def plot_learning_rates(
    losses: Mapping[str, Mapping[float, Any]], *, ax: Axes | None = None
) -> Axes:
    """Draw {method: {learning rate: losses of the seeds}}: mean, least and greatest.

    The best learning rate of each method carries a ring; None or NaN is a run that
    broke, and leaves a gap.
    """
    ax = new_axes(ax)
    for label, style in line_styles(losses).items():
        rates = sorted(losses[label])
        seeds = [_scores(losses[label][rate], percent=False) for rate in rates]
        means = [sum(values) / len(values) for values in seeds]
        look = {"linewidth": 1.5, "markersize": 5} | style
        ax.plot(rates, means, label=display_name(label), **look)
        band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
        ax.fill_between(rates, [*map(min, seeds)], [*map(max, seeds)], **band)
        pairs = [(y, x) for y, x in zip(means, rates, strict=True) if math.isfinite(y)]
        if pairs:
            loss, rate = min(pairs)
            ring = {"markeredgecolor": style["color"], "markeredgewidth": 1.5}
            ax.plot(rate, loss, "o", markersize=12, markerfacecolor="none", **ring)
    ax.set_xscale("log")
    ylabel = "validation loss (nats per token)"
    return finish(ax, xlabel="learning rate", ylabel=ylabel)


def _rows(ax: Axes, names: Sequence[str], least: int = 1) -> None:
    """One named row each from the top down, no thicker than `least` of them are."""
    ax.set_yticks(range(len(names)), names)
    spare = max(least - len(names), 0) / 2
    ax.set_ylim(len(names) - 0.5 + spare, -0.5 - spare)
    ax.grid(False, axis="y")
