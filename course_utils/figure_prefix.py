"""Where prompt and prefix tuning put what they learn. `plotting` offers it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from course_utils.figure_style import METHOD_COLOURS, finish, legend_below, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEXT, FOLLOWS = "#d9d9d9", "#ffffff"


def plot_prefix(
    tokens: Sequence[str],
    *,
    virtual: int = 3,
    layers: int = 5,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Draw which cells are learned: a row of input, or a column at every layer.

    Left prompt tuning, right prefix tuning; a row is a layer, the input lowest, and a
    column a position, virtual tokens first.

    Args:
        tokens: texts of the real tokens, at most 8.
        virtual: virtual tokens in front.
        layers: layers drawn above the input.
        ax: axes to draw in; None opens a figure.
        title: of the figure.

    Raises:
        ValueError: more than 8 tokens.
    """
    from matplotlib.patches import Patch, Rectangle

    if len(tokens) > 8:
        raise ValueError(f"at most 8 tokens are drawn, not {len(tokens)}")
    ax = new_axes(ax)
    looks = {
        "computed": {"facecolor": TEXT},
        "follows": {"facecolor": FOLLOWS},
        "prompt": {"facecolor": METHOD_COLOURS["prompt"], "hatch": "//"},
        "prefix": {"facecolor": METHOD_COLOURS["prefix"], "hatch": ".."},
    }
    width, ticks, names = virtual + len(tokens), [], []
    for block, method in enumerate(("prompt", "prefix")):
        left = block * (width + 1.5)
        for column in range(width):
            for row in range(layers + 1):
                kind = "computed" if column >= virtual else "follows"
                if column < virtual:
                    learned = row == 0 if method == "prompt" else row > 0
                    kind = method if learned else kind
                if method == "prefix" and row == 0 and column < virtual:
                    continue  # a prefix has no input
                cell = (left + column - 0.5, row - 0.5)
                edge = {"edgecolor": "#666666", "linewidth": 0.7}
                ax.add_patch(Rectangle(cell, 1, 1, **edge, **looks[kind]))
            ticks.append(left + column)
            names.append("" if column < virtual else tokens[column - virtual].strip())
        middle = left + (width - 1) / 2
        ax.annotate(f"{method} tuning", (middle, layers + 0.8), ha="center", fontsize=9)
    ax.set_xticks(ticks, names, rotation=90)
    ax.tick_params(axis="x", labelsize=7.5, length=0)
    ax.set_yticks(range(layers + 1), ["input", *(f"layer {i}" for i in range(layers))])
    ax.set_xlim(-0.7, 2 * width + 1.2)
    ax.set_ylim(-0.6, layers + 1.4)
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    words = {
        "prompt": "learned row",
        "prefix": "learned keys and values",
        "follows": "follows from the learned row",
        "computed": "of the text",
    }
    handles = [
        Patch(edgecolor="#666666", label=word, **looks[kind])
        for kind, word in words.items()
    ]
    legend_below(ax, 0.72, handles=handles, ncols=2)
    return finish(ax, xlabel="position", title=title, legend=False)
