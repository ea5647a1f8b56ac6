"""Figures of runs and models: loss, spectrum, memory. `plotting` offers them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from course_utils.figure_style import (
    display_name,
    finish,
    legend_below,
    line_styles,
    new_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
