"""Figures of tokens: label masks and attention masks. `plotting` offers them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from course_utils.figure_style import HEIGHT, finish, legend_below, new_axes
from course_utils.figure_text import token_fonts, token_texts, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 88  # monospace characters in a line of tokens
LEARNED, PROMPT, PADDING = "#0b3c5d", "#d9d9d9", "#ffffff"


def _rows(values: Any) -> list[list[Any]]:
    """One or several sequences, tensors included, as a list of lists."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    values = [v.tolist() if hasattr(v, "tolist") else v for v in values]
    nested = bool(values) and isinstance(values[0], list | tuple)
    return [list(v) for v in values] if nested else [values]


def _kinds(labels: Any, attention_mask: Any, lengths: list[int]) -> list[list[str]]:
    """`learned`, `prompt` or `padding` for each token of each row."""
    rows = _rows(labels)
    masks = (
        [[1] * n for n in lengths] if attention_mask is None else _rows(attention_mask)
    )
    for what, given in (("labels", rows), ("attention_mask", masks)):
        if [len(row) for row in given] != lengths:
            raise ValueError(
                f"{what} has lengths {[len(r) for r in given]}, input_ids {lengths}"
            )
    return [
        [
            "padding" if not seen else "prompt" if label == -100 else "learned"
            for label, seen in zip(row, mask, strict=True)
        ]
        for row, mask in zip(rows, masks, strict=True)
    ]


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _flow(
    texts: list[str], kinds: list[str]
) -> list[list[tuple[str, str, float, int]]]:
    """Break cells (text, kind, x, width) into lines, a run of padding in one cell."""
    cells: list[list] = []
    for text, kind in zip(texts, kinds, strict=True):
        if kind == "padding" and cells and cells[-1][1] == "padding":
            cells[-1][2] += 1
        else:
            cells.append([text, kind, 1])
    lines: list[list[tuple[str, str, float, int]]] = [[]]
    x = 0.0
    for text, kind, count in cells:
        shown = f"{text} × {count}" if count > 1 else text
        while _width(shown) > COLUMNS - 1:
            shown = shown[:-2] + "…"
        width = _width(shown) + 1
        if x + width > COLUMNS:
            lines.append([])
            x = 0.0
        lines[-1].append((shown, kind, x, width))
        x += width
    return lines


def plot_mask(
    input_ids: Any,
    labels: Any,
    attention_mask: Any = None,
    *,
    tokenizer: Any = None,
    names: Sequence[str] | None = None,
    compact: bool = False,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Draw each token as a cell: learned, not learned (label -100), or padding.

    The loss learns a token whose label is not -100. The texts run on like a page, with
    a gap between examples; a run of padding is one cell with its count.

    Args:
        input_ids: token ids (T,) or (B, T), lists or tensors; or the tokens' texts.
        labels: the same shape, -100 on what is not learned.
        attention_mask: the same shape, 0 on padding; None means no padding.
        tokenizer: turns ids into text; without one the ids are shown.
        names: a heading for each example.
        compact: draw a small grid without text, one row an example.
        ax: axes to draw in; None opens a figure as tall as the text needs.
        title: of the figure.

    Raises:
        ValueError: the shapes differ.
    """
    from matplotlib.patches import Patch, Rectangle

    ids = _rows(input_ids)
    kinds = _kinds(labels, attention_mask, [len(row) for row in ids])
    looks = {
        "learned": {"facecolor": LEARNED, "edgecolor": "white"},
        "prompt": {"facecolor": PROMPT, "edgecolor": "white"},
        "padding": {"facecolor": PADDING, "edgecolor": "#999999", "hatch": "////"},
    }
    words = {
        "learned": "learned",
        "prompt": "not learned (label −100)",
        "padding": "padding (attention 0)",
    }
    if compact:
        ax = new_axes(ax, height=min(HEIGHT, 1.2 + 0.3 * len(kinds)))
        for row, line in enumerate(kinds):
            for x, kind in enumerate(line):
                edge = 0.4 if len(line) < 120 else 0
                look = looks[kind] | {"linewidth": edge}
                box = Rectangle((x - 0.5, row - 0.4), 1, 0.8, **look)
                ax.add_patch(box)
        ax.set_xlim(-0.5, max(map(len, kinds)) - 0.5)
        ax.set_ylim(len(kinds) - 0.5, -0.5)
        ax.set_yticks(range(len(kinds)), names or [str(i) for i in range(len(kinds))])
        ax.grid(False)
        finish(ax, xlabel="position (tokens)", ylabel="example", title=title)
    else:
        blocks = [
            _flow(token_texts(row, tokenizer), kind)
            for row, kind in zip(ids, kinds, strict=True)
        ]
        height = sum(len(block) + 0.5 + bool(names) for block in blocks)
        ax = new_axes(ax, height=0.5 + 0.3 * bool(title) + 0.2 * height)
        y = 0.0
        for position, block in enumerate(blocks):
            if names:
                heading = visible(names[position], spaces=True)
                ax.text(0, y + 0.55, heading, fontsize=8, va="center",
                        family=token_fonts()[0][1:],
                        parse_math=False)  # fmt: skip
                y += 1
            for line in block:
                for text, kind, x, width in line:
                    box = Rectangle((x, y), width, 0.92, linewidth=0.8, **looks[kind])
                    ax.add_patch(box)
                    ax.text(x + width / 2, y + 0.5, text, fontsize=7.2, ha="center",
                            va="center", family=token_fonts()[0], parse_math=False,
                            color="white" if kind == "learned" else "black",
                            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6}
                            if kind == "padding" else None)  # fmt: skip
                y += 1
            y += 0.5
        ax.set_xlim(0, COLUMNS)
        ax.set_ylim(y, -0.1)
        ax.axis("off")
        finish(ax, title=title)
    present = [kind for kind in looks if any(kind in line for line in kinds)]
    handles = [
        Patch(**looks[k] | {"edgecolor": "#999999"}, label=words[k]) for k in present
    ]
    legend_below(ax, 0.42 if compact else 0.02, handles=handles, ncols=3)
    return ax


def plot_attention_mask(
    matrix: Any,
    *,
    tokens: Sequence[str] | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Axes:
    """Draw which position may look at which: dark where attention is allowed.

    Args:
        matrix: (T, T), row = the position that looks, column = the one looked at;
            boolean, 0/1, or additive (0 where allowed, very negative where not).
            Leading dimensions of length 1 are dropped.
        tokens: texts of the T positions, shown up to 24.
        ax: axes to draw in; None opens a figure.
        title: of the figure.

    Raises:
        ValueError: the matrix is not square.
    """
    import numpy as np

    allowed = np.asarray(matrix.float() if hasattr(matrix, "float") else matrix)
    allowed = allowed.squeeze() if allowed.ndim > 2 else allowed
    if allowed.ndim != 2 or allowed.shape[0] != allowed.shape[1]:
        raise ValueError(f"an attention mask is (T, T), not {allowed.shape}")
    allowed = allowed > -1 if (allowed < 0).any() else allowed > 0
    size = len(allowed)
    ax = new_axes(ax)
    ax.imshow(allowed, cmap="Greys", vmin=0, vmax=1.25, interpolation="nearest")
    ax.grid(False)
    ax.spines[["top", "right"]].set_visible(True)
    if size <= 40:
        edges = [i - 0.5 for i in range(1, size)]
        ax.set_xticks(edges, minor=True)
        ax.set_yticks(edges, minor=True)
        ax.grid(True, which="minor", color="#999999", linewidth=0.5)
        ax.tick_params(which="minor", length=0)
    if tokens is not None and size <= 24:
        names = [visible(str(token)) for token in tokens]
        size_pt = 7.5 if size <= 14 else 6
        look = {"fontsize": size_pt, "family": token_fonts()[0], "parse_math": False}
        ax.set_xticks(range(size), names, rotation=90, **look)
        ax.set_yticks(range(size), names, **look)
    return finish(ax, xlabel="is looked at", ylabel="position that looks", title=title)
