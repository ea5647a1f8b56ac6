"""The course in one picture: where each method puts what it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from course_utils.figure_style import (
    HEIGHT,
    METHOD_COLOURS,
    METHOD_NAMES,
    WIDTH,
    finish,
    new_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# method: where its number stands in the picture (inches), and what it trains
_PLACES = {
    "baseline": (0.41, 2.68, "nothing: examples in the prompt"),
    "full": (3.0, 3.08, "every weight"),
    "frozen": (4.55, 2.77, "the last layers, or the head"),
    "lora": (3.08, 1.9, "low-rank BA beside frozen W"),
    "dora": (3.36, 1.9, "LoRA, and a length for each output"),
    "pissa": (3.64, 1.9, "BA from the main part of W"),
    "qlora": (3.92, 1.9, "LoRA beside a 4-bit W"),
    "prompt": (1.2, 1.9, "vectors before the prompt"),
    "p_tuning": (1.6, 1.9, "the same, made by a small network"),
    "prefix": (2.42, 1.9, "keys and values in every layer"),
}


def plot_method_map(
    trainable: Mapping[str, int] | None = None,
    *,
    total: int | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Draw where each method puts what it trains: the course in one picture.

    Args:
        trainable: {method: parameters that it trains}, written beside its name.
        total: parameters of the model, for per cents.
        ax: axes to draw in; None opens a figure.
        title: of the figure.
    """
    from matplotlib.patches import FancyBboxPatch

    if ax is None:
        ax = new_axes(height=HEIGHT + 0.2)
    ax.axis("off")
    ax.set_xlim(0, WIDTH)
    ax.set_ylim(0, HEIGHT + 0.2)

    def box(x: float, y: float, w: float, h: float, text: str, **look: Any) -> None:
        style = {
            "facecolor": "#f0f0f0",
            "edgecolor": "#555555",
            "linewidth": 1.0,
        } | look
        shape = "round,pad=0,rounding_size=0.06"
        ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle=shape, **style))
        ax.text(x + w / 2, y + h / 2, text, fontsize=8, ha="center", va="center")

    def arrow(x: float, to: float, y: float = 2.3) -> None:
        ax.annotate("", (to, y), (x, y), arrowprops={"arrowstyle": "->", "lw": 1.1})

    def spot(method: str, x: float, y: float) -> None:
        number = list(_PLACES).index(method) + 1
        light = ("baseline", "dora", "p_tuning", "prefix")
        ink = "black" if method in light else "white"
        size = 8 if number < 10 else 6
        ax.text(x, y, str(number), fontsize=size, color=ink, weight="bold",
                ha="center", va="center", zorder=5,
                bbox={"boxstyle": "circle,pad=0.25", "edgecolor": "white",
                      "facecolor": METHOD_COLOURS[method]})  # fmt: skip

    box(0.05, 2.05, 0.72, 0.5, "prompt\ntext")
    box(1.0, 2.05, 0.85, 0.5, "embedding\n(d wide)")
    box(2.1, 1.78, 2.85, 1.1, "", facecolor="white")
    ax.text(2.2, 2.77, "× L layers", fontsize=7.5, va="center")
    box(2.25, 2.02, 1.25, 0.6, "attention\n$W_q\\ W_k\\ W_v\\ W_o$")
    box(3.75, 2.02, 1.05, 0.6, "MLP\n$W_1\\ W_2\\ W_3$")
    box(5.2, 2.05, 0.72, 0.5, "next\ntoken")
    ax.text(4.08, 1.895, "beside any W", fontsize=7, va="center")
    for x, to in ((0.77, 1.0), (1.85, 2.25), (3.5, 3.75), (4.8, 5.2)):
        arrow(x, to)
    ax.plot(
        [1.0, 1.0, 4.95, 4.95], [3.0, 3.08, 3.08, 3.0], color="black", linewidth=1.1
    )
    for method, (x, y, _) in _PLACES.items():
        spot(method, x, y)
    for turn, (method, (_, _, what)) in enumerate(_PLACES.items()):
        x, y = 0.12 + 3.05 * (turn // 5), 1.42 - 0.3 * (turn % 5)
        spot(method, x, y)
        count = (trainable or {}).get(method)
        share = f" = {100 * count / total:.3g} %" if count and total else ""
        figures = f" · {_short(count)}{share}" if count is not None else ""
        ax.text(x + 0.17, y + 0.065, METHOD_NAMES[method] + figures, fontsize=8,
                weight="bold", va="center")  # fmt: skip
        ax.text(x + 0.17, y - 0.075, what, fontsize=7, va="center", color="#333333")
    return finish(ax, title=title, legend=False)


def _short(count: int) -> str:
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return str(count)
