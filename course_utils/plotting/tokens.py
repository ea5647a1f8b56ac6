"""Figures of tokens, of what is learned of them, and of where each method acts."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from course_utils.plotting.style import (
    HEIGHT,
    METHOD_COLOURS,
    METHOD_NAMES,
    WIDTH,
    finish,
    legend_below,
    new_axes,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIGNS = {"\n": "↵", "\t": "⇥", " ": "␣"}
_CJK_FONTS = (
    "Noto Sans Mono CJK SC",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Microsoft YaHei",
    "SimHei",
    "Arial Unicode MS",
)

LEARNED, PROMPT = "#0b3c5d", "#d9d9d9"
_LABELS = {
    "learned": "learned",
    "prompt": "not learned (label −100)",
    "padding": "padding (attention 0)",
}
_LOOKS = {
    "learned": {"facecolor": LEARNED, "edgecolor": "white"},
    "prompt": {"facecolor": PROMPT, "edgecolor": "white"},
    "padding": {"facecolor": "#ffffff", "edgecolor": "#999999", "hatch": "////"},
}
_COLUMNS = 88  # monospace characters in a line of tokens


@lru_cache(maxsize=1)
def _token_fonts() -> tuple[list[str], list[Any]]:
    """Font families to draw tokens with, and their opened files."""
    from matplotlib import font_manager, ft2font

    installed = {font.name for font in font_manager.fontManager.ttflist}
    names = ["DejaVu Sans Mono", "DejaVu Sans"]
    names += [name for name in _CJK_FONTS if name in installed][:1]
    files = [font_manager.findfont(name) for name in names]
    return names, [ft2font.FT2Font(file) for file in files]


def _visible(text: str) -> str:
    """Make a token's text drawable: signs for white space, escapes for the rest.

    A character that no font at hand has is written as its escape, so that drawing it
    warns of no missing glyph.

    Examples:
        >>> _visible(" on" + chr(10))
        '␣on↵'
    """
    fonts = _token_fonts()[1]
    shown = []
    for char in text:
        sign = _SIGNS.get(char, char)
        drawable = unicodedata.category(sign)[0] != "C" and any(
            font.get_char_index(ord(sign)) for font in fonts
        )
        shown.append(sign if drawable else ascii(char)[1:-1])
    return "".join(shown)


@lru_cache(maxsize=1)
def _byte_letters() -> dict[str, int]:
    """GPT-2's table: the letters that byte-level tokenizers write for the bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}


def _token_texts(input_ids: Sequence[Any], tokenizer: Any = None) -> list[str]:
    """Give each token the text to draw in its cell.

    Args:
        input_ids: token ids (T,), or texts, which are kept.
        tokenizer: without one an id is shown as a number. A token that holds part of a
            character is shown as its bytes.
    """
    texts = []
    for token in input_ids:
        if isinstance(token, str):
            text = token
        elif tokenizer is None:
            text = str(int(token))
        else:
            text = tokenizer.decode([int(token)], clean_up_tokenization_spaces=False)
            name = tokenizer.convert_ids_to_tokens(int(token))
            if "\ufffd" in text:
                letters = _byte_letters()
                known = all(letter in letters for letter in name)
                text = "".join(rf"\x{letters[c]:02x}" for c in name) if known else name
            elif name.startswith("▁") and not text.startswith(" "):
                text = " " + text
        texts.append(_visible(text) or "∅")
    return texts


def plot_mask(
    input_ids: Any,
    labels: Any,
    attention_mask: Any = None,
    *,
    tokenizer: Any = None,
    compact: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw each token as a cell: learned, not learned (label -100), or padding.

    The texts run on like a page, in a figure as tall as they need, with a gap between
    examples; a run of padding is one cell with its count.

    Args:
        input_ids: token ids (T,) or (B, T), lists or tensors; or the tokens' texts.
        labels: the same shape, -100 on what is not learned.
        attention_mask: the same shape, 0 on padding; None means no padding.
        tokenizer: turns ids into text; without one the ids are shown.
        compact: draw a small grid without text, one row an example.

    Raises:
        ValueError: the shapes differ.
    """
    from matplotlib.patches import Patch

    ids = _rows(input_ids)
    states = _states(labels, attention_mask, [len(row) for row in ids])
    if compact:
        ax = _draw_grid(ax, states)
    else:
        texts = [_token_texts(row, tokenizer) for row in ids]
        ax = _draw_pages(ax, [*map(_flow, texts, states)])
    ax.grid(False)
    present = [state for state in _LOOKS if any(state in row for row in states)]
    handles = [
        Patch(**_LOOKS[state] | {"edgecolor": "#999999"}, label=_LABELS[state])
        for state in present
    ]
    legend_below(ax, handles=handles, ncols=3)
    return ax


def _rows(values: Any) -> list[list[Any]]:
    """One or several sequences, tensors included, as a list of lists."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    values = [v.tolist() if hasattr(v, "tolist") else v for v in values]
    nested = bool(values) and isinstance(values[0], list | tuple)
    return [list(v) for v in values] if nested else [values]


def _states(labels: Any, attention_mask: Any, lengths: list[int]) -> list[list[str]]:
    """`learned`, `prompt` or `padding` for each token of each row."""
    ones = [[1] * length for length in lengths]
    masks = ones if attention_mask is None else _rows(attention_mask)
    rows = _rows(labels)
    for name, given in (("labels", rows), ("attention_mask", masks)):
        if [len(row) for row in given] != lengths:
            raise ValueError(
                f"{name} has lengths {[len(r) for r in given]}, input_ids {lengths}"
            )
    return [
        [
            "padding" if not seen else "prompt" if label == -100 else "learned"
            for label, seen in zip(row, mask, strict=True)
        ]
        for row, mask in zip(rows, masks, strict=True)
    ]


def _draw_grid(ax: Axes | None, states: list[list[str]]) -> Axes:
    from matplotlib.patches import Rectangle

    ax = new_axes(ax, height=min(HEIGHT, 1.2 + 0.3 * len(states)))
    for y, row in enumerate(states):
        for x, state in enumerate(row):
            look = _LOOKS[state] | {"linewidth": 0.4 if len(row) < 120 else 0}
            ax.add_patch(Rectangle((x - 0.5, y - 0.4), 1, 0.8, **look))
    ax.set_xlim(-0.5, max(map(len, states)) - 0.5)
    ax.set_ylim(len(states) - 0.5, -0.5)
    ax.set_yticks(range(len(states)))
    return finish(ax, xlabel="position (tokens)", ylabel="example")


# text, state, x and width in characters
_Cell = tuple[str, str, float, int]


def _flow(texts: list[str], states: list[str]) -> list[list[_Cell]]:
    """Break an example's cells into lines, a run of padding in one cell."""
    cells: list[list] = []
    for text, state in zip(texts, states, strict=True):
        if state == "padding" and cells and cells[-1][1] == "padding":
            cells[-1][2] += 1
        else:
            cells.append([text, state, 1])
    lines: list[list[_Cell]] = [[]]
    x = 0.0
    for text, state, count in cells:
        shown = f"{text} × {count}" if count > 1 else text
        while _width(shown) > _COLUMNS - 1:
            shown = shown[:-2] + "…"
        width = _width(shown) + 1
        if x + width > _COLUMNS:
            lines.append([])
            x = 0.0
        lines[-1].append((shown, state, x, width))
        x += width
    return lines


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _draw_pages(ax: Axes | None, pages: list[list[list[_Cell]]]) -> Axes:
    from matplotlib.patches import Rectangle

    gap = 0.5  # of a line, after each example
    ax = new_axes(ax, height=0.5 + 0.2 * sum(len(page) + gap for page in pages))
    centred = {"ha": "center", "va": "center", "family": _token_fonts()[0]}
    y = 0.0
    for page in pages:
        for line in page:
            for text, state, x, width in line:
                box = Rectangle((x, y), width, 0.92, linewidth=0.8, **_LOOKS[state])
                ax.add_patch(box)
                look: dict[str, Any] = {"parse_math": False, "fontsize": 7.2} | centred
                look["color"] = "white" if state == "learned" else "black"
                if state == "padding":  # keep the hatch off the text
                    look["bbox"] = {"facecolor": "white", "edgecolor": "none"}
                    look["bbox"]["pad"] = 0.6
                ax.text(x + width / 2, y + 0.5, text, **look)
            y += 1
        y += gap
    ax.set_xlim(0, _COLUMNS)
    ax.set_ylim(y, -0.1)
    ax.axis("off")
    return ax


def plot_attention_mask(
    matrix: Any, *, tokens: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw which position may look at which: dark where attention is allowed.

    Args:
        matrix: (T, T), row = the position that looks, column = the one looked at;
            boolean, 0/1, or additive (0 where allowed, very negative where not).
            Leading dimensions of length 1 are dropped.
        tokens: texts of the T positions, shown up to 24.

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
        names = [_visible(str(token)) for token in tokens]
        look = {"family": _token_fonts()[0], "parse_math": False}
        look["fontsize"] = 7.5 if size <= 14 else 6
        ax.set_xticks(range(size), names, rotation=90, **look)
        ax.set_yticks(range(size), names, **look)
    return finish(ax, xlabel="is looked at", ylabel="position that looks")


def plot_prefix(tokens: Sequence[str], *, ax: Axes | None = None) -> Axes:
    """Draw which cells are learned: a row of input, or a column at every layer.

    Left prompt tuning, right prefix tuning; a row is a layer, the input lowest, and a
    column a position, virtual tokens first.

    Args:
        tokens: texts of the real tokens, at most 8.

    Raises:
        ValueError: more than 8 tokens.
    """
    from matplotlib.patches import Patch, Rectangle

    if len(tokens) > 8:
        raise ValueError(f"at most 8 tokens are drawn, not {len(tokens)}")
    virtual, layers = 3, 5
    looks = {
        "learned row": {"facecolor": METHOD_COLOURS["prompt"], "hatch": "//"},
        "learned keys and values": {
            "facecolor": METHOD_COLOURS["prefix"],
            "hatch": "..",
        },
        "follows from the learned row": {"facecolor": "#ffffff"},
        "of the text": {"facecolor": PROMPT},
    }

    def state(method: str, column: int, row: int) -> str | None:
        if column >= virtual:
            return "of the text"
        if method == "prefix":  # it has no input
            return "learned keys and values" if row else None
        return "follows from the learned row" if row else "learned row"

    ax = new_axes(ax)
    width, edge = virtual + len(tokens), {"edgecolor": "#666666"}
    names = [""] * virtual + [token.strip() for token in tokens]
    starts = {"prompt": 0.0, "prefix": width + 1.5}
    for method, left in starts.items():
        for column in range(width):
            for row in range(layers + 1):
                if cell := state(method, column, row):
                    corner = (left + column - 0.5, row - 0.5)
                    look = looks[cell] | edge | {"linewidth": 0.7}
                    ax.add_patch(Rectangle(corner, 1, 1, **look))
        middle = (left + (width - 1) / 2, layers + 0.8)
        ax.annotate(f"{method} tuning", middle, ha="center", fontsize=9)
    ticks = [left + column for left in starts.values() for column in range(width)]
    ax.set_xticks(ticks, 2 * names, rotation=90)
    ax.tick_params(axis="x", labelsize=7.5, length=0)
    ax.set_yticks(range(layers + 1), ["input", *(f"layer {i}" for i in range(layers))])
    ax.set_xlim(-0.7, 2 * width + 1.2)
    ax.set_ylim(-0.6, layers + 1.4)
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    handles = [Patch(label=text, **look, **edge) for text, look in looks.items()]
    legend_below(ax, handles=handles, ncols=2)
    return finish(ax, xlabel="position", legend=False)


# Inches, in a picture of 6 x 3.4: x, y, width, height, text.
_BOXES = [
    (0.05, 2.05, 0.72, 0.5, "prompt\ntext"),
    (1.0, 2.05, 0.85, 0.5, "embedding\n(d wide)"),
    (2.1, 1.78, 2.85, 1.1, ""),
    (2.25, 2.02, 1.25, 0.6, "attention\n$W_q\\ W_k\\ W_v\\ W_o$"),
    (3.75, 2.02, 1.05, 0.6, "MLP\n$W_1\\ W_2\\ W_3$"),
    (5.2, 2.05, 0.72, 0.5, "next\ntoken"),
]
# Where each method's number stands in it, and what the method trains.
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
_LIGHT = ("baseline", "dora", "p_tuning", "prefix")  # colours under black numbers


def plot_method_map(*, ax: Axes | None = None) -> Axes:
    """Draw where each method puts what it trains: the course in one picture."""
    from matplotlib.patches import FancyBboxPatch

    ax = new_axes(ax, height=HEIGHT + 0.2)
    ax.axis("off")
    ax.set_xlim(0, WIDTH)
    ax.set_ylim(0, HEIGHT + 0.2)
    rounded = {"boxstyle": "round,pad=0,rounding_size=0.06", "edgecolor": "#555555"}
    for x, y, width, height, text in _BOXES:
        colour = "#f0f0f0" if text else "white"
        ax.add_patch(FancyBboxPatch((x, y), width, height, facecolor=colour, **rounded))
        middle = (x + width / 2, y + height / 2)
        ax.text(*middle, text, fontsize=8, ha="center", va="center")
    arrow = {"arrowstyle": "->", "linewidth": 1.1}
    for start, end in ((0.77, 1.0), (1.85, 2.25), (3.5, 3.75), (4.8, 5.2)):
        ax.annotate("", (end, 2.3), (start, 2.3), arrowprops=arrow)
    bracket = [(1.0, 3.0), (1.0, 3.08), (4.95, 3.08), (4.95, 3.0)]
    ax.plot(*zip(*bracket, strict=True), color="black", linewidth=1.1)
    ax.text(2.2, 2.77, "× L layers", fontsize=7.5, va="center")
    ax.text(4.08, 1.895, "beside any W", fontsize=7, va="center")
    for index, (method, (x, y, trained)) in enumerate(_PLACES.items()):
        left, line = 0.12 + 3.05 * (index // 5), 1.42 - 0.3 * (index % 5)
        for place in ((x, y), (left, line)):
            circle = {"boxstyle": "circle,pad=0.25", "edgecolor": "white"}
            ax.text(
                *place,
                str(index + 1),
                fontsize=8 if index < 9 else 6,
                color="black" if method in _LIGHT else "white",
                weight="bold",
                ha="center",
                va="center",
                zorder=5,
                bbox=circle | {"facecolor": METHOD_COLOURS[method]},
            )
        name = {"fontsize": 8, "weight": "bold", "va": "center"}
        ax.text(left + 0.17, line + 0.065, METHOD_NAMES[method], **name)
        what = {"fontsize": 7, "color": "#333333", "va": "center"}
        ax.text(left + 0.17, line - 0.075, trained, **what)
    return ax
