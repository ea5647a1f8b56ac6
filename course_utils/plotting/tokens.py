"""Figures of tokens, of what is learned of them, and of where each method acts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, count, groupby, product
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
_CJK_FONTS = "CJK|Source Han|WenQuanYi|PingFang|Hiragino|YaHei|SimHei|Arial Unicode"
LEARNED, PROMPT = "#0b3c5d", "#d9d9d9"
_LOOKS: dict[str, dict[str, Any]] = {
    state: {"label": label, "facecolor": colour, "edgecolor": edge, "hatch": hatch}
    for state, label, colour, edge, hatch in (
        ("learned", "learned", LEARNED, "white", None),
        ("prompt", "not learned (label −100)", PROMPT, "white", None),
        ("padding", "padding (attention 0)", "white", "#999999", "////"),
    )
}
_COLUMNS = 88  # monospace characters in a line of tokens
# GPT-2's table: the letters that byte-level tokenizers write for the bytes.
_PLAIN, _OTHERS = {*range(33, 127), *range(161, 173), *range(174, 256)}, count(256)
_LETTERS = {chr(b if b in _PLAIN else next(_OTHERS)): b for b in range(256)}


@lru_cache(maxsize=1)
def _token_fonts() -> tuple[list[str], list[Any]]:
    """Font families to draw tokens with, and their opened files."""
    from matplotlib import font_manager, ft2font

    installed = sorted({font.name for font in font_manager.fontManager.ttflist})
    names = ["DejaVu Sans Mono", "DejaVu Sans"]
    names += [name for name in installed if re.search(_CJK_FONTS, name)][:1]
    return names, [ft2font.FT2Font(font_manager.findfont(name)) for name in names]


def _visible(text: str) -> str:
    """Write white space as signs, and what no font at hand has as escapes."""
    shown = []
    for char in text:
        sign = _SIGNS.get(char, char)
        drawable = unicodedata.category(sign)[0] != "C" and any(
            font.get_char_index(ord(sign)) for font in _token_fonts()[1]
        )
        shown.append(sign if drawable else ascii(char)[1:-1])
    return "".join(shown)


def _token_text(token: Any, tokenizer: Any = None) -> str:
    """Text of a token's cell; without a tokenizer its id, of half a character bytes."""
    if isinstance(token, str):
        text = token
    elif tokenizer is None:
        text = str(int(token))
    else:
        text = tokenizer.decode([int(token)], clean_up_tokenization_spaces=False)
        name = tokenizer.convert_ids_to_tokens(int(token))
        if "\ufffd" in text and not name.isascii() and set(name) <= _LETTERS.keys():
            text = "".join(rf"\x{_LETTERS[letter]:02x}" for letter in name)
        elif "\ufffd" in text:
            text = name
        elif name.startswith("▁") and not text.startswith(" "):
            text = " " + text
    return _visible(text) or "∅"


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

    The texts run on like a page, with a gap between examples, a run of padding as one
    cell with its count; `compact` draws a small grid without text, one row an example.

    Args:
        input_ids: token ids (T,) or (B, T), lists or tensors; or the tokens' texts.
        labels: the same shape, -100 on what is not learned.
        attention_mask: the same shape, 0 on padding.

    Raises ValueError: the shapes differ.
    """
    from matplotlib.patches import Patch

    ids = _rows(input_ids)
    states = _states(labels, attention_mask, [len(row) for row in ids])
    if compact:
        ax = _draw_grid(ax, states)
    else:
        texts = [[_token_text(token, tokenizer) for token in row] for row in ids]
        ax = _draw_pages(ax, [*map(_flow, texts, states)])
    ax.grid(False)
    handles = [Patch(**_LOOKS[key]) for key in _LOOKS if key in chain(*states)]
    legend_below(ax, handles=handles, ncols=3)
    return ax


def _rows(values: Any) -> list[list[Any]]:
    """One or several sequences, tensors included, as a list of lists."""
    values = [v.tolist() if hasattr(v, "tolist") else v for v in values]
    nested = bool(values) and isinstance(values[0], list | tuple)
    return [list(v) for v in values] if nested else [values]


def _states(labels: Any, attention_mask: Any, lengths: list[int]) -> list[list[str]]:
    """`learned`, `prompt` or `padding` for each token of each row."""
    rows, masks = _rows(labels), [[1] * length for length in lengths]
    if attention_mask is not None:
        masks = _rows(attention_mask)
    for name, given in (("labels", rows), ("attention_mask", masks)):
        if (sizes := [len(row) for row in given]) != lengths:
            raise ValueError(f"{name} has lengths {sizes}, input_ids {lengths}")
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
        line = 0.4 if len(row) < 120 else 0
        for x, state in enumerate(row):
            corner = (x - 0.5, y - 0.4)
            ax.add_patch(Rectangle(corner, 1, 0.8, linewidth=line, **_LOOKS[state]))
    ax.set(xlim=(-0.5, max(map(len, states)) - 0.5), ylim=(len(states) - 0.5, -0.5))
    ax.set_yticks(range(len(states)))
    return finish(ax, xlabel="position (tokens)", ylabel="example", legend=False)


def _flow(texts: list[str], states: list[str]) -> list[list[tuple[str, str, int, int]]]:
    """Lines of cells (text, state, left edge, width), padding as one with its count."""
    lines: list[list[tuple[str, str, int, int]]] = [[]]
    x = 0
    for state, run in groupby(zip(texts, states, strict=True), lambda pair: pair[1]):
        shown = [text for text, _ in run]
        if state == "padding" and len(shown) > 1:
            shown = [f"{shown[0]} × {len(shown)}"]
        for text in shown:
            while _width(text) > _COLUMNS - 1:
                text = text[:-2] + "…"
            width = _width(text) + 1
            if x + width > _COLUMNS:
                lines.append([])
                x = 0
            lines[-1].append((text, state, x, width))
            x += width
    return lines


def _width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _draw_pages(ax: Axes | None, pages: list[list[list[tuple]]]) -> Axes:
    from matplotlib.patches import Rectangle

    gap = 0.5  # of a line, after each example
    ax = new_axes(ax, height=0.5 + 0.2 * sum(len(page) + gap for page in pages))
    look = {"ha": "center", "va": "center", "fontsize": 7.2, "parse_math": False}
    look["family"] = _token_fonts()[0]
    no_hatch = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}  # behind a text
    y = 0.0
    for page in pages:
        for line in page:
            for text, state, x, width in line:
                ax.add_patch(Rectangle((x, y), width, 0.92, **_LOOKS[state]))
                look["color"] = "white" if state == "learned" else "black"
                look["bbox"] = no_hatch if state == "padding" else None
                ax.text(x + width / 2, y + 0.5, text, **look)
            y += 1
        y += gap
    ax.set(xlim=(0, _COLUMNS), ylim=(y, -0.1))
    ax.axis("off")
    return ax


def plot_attention_mask(
    matrix: Any, *, tokens: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw which position may look at which: dark where attention is allowed.

    `matrix` (T, T), with a row for each position that looks, is boolean, 0/1, or
    additive (0 where allowed, very negative where not); dimensions of length 1 before
    them are dropped. `tokens`, texts of the T positions, are shown up to 24.
    Raises ValueError: the matrix is not square.
    """
    import numpy as np

    matrix = matrix.float() if hasattr(matrix, "float") else matrix
    allowed = np.asarray(matrix)
    while allowed.ndim > 2 and len(allowed) == 1:
        allowed = allowed[0]
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
    column a position, virtual tokens first, then at most 8 `tokens`, else a ValueError.
    """
    from matplotlib.patches import Patch, Rectangle

    if len(tokens) > 8:
        raise ValueError(f"at most 8 tokens are drawn, not {len(tokens)}")
    virtual, layers = 3, 5
    looks = {
        text: {"label": text, "facecolor": colour, "hatch": hatch, "edgecolor": "0.4"}
        for text, colour, hatch in (
            ("learned row", METHOD_COLOURS["prompt"], "//"),
            ("learned keys and values", METHOD_COLOURS["prefix"], ".."),
            ("follows from the learned row", "white", None),
            ("of the text", PROMPT, None),
        )
    }
    width = virtual + len(tokens)
    # Left edge, and what a virtual token is at the input and in a layer.
    methods = (
        ("prompt tuning", 0.0, "learned row", "follows from the learned row"),
        ("prefix tuning", width + 1.5, None, "learned keys and values"),
    )
    ax = new_axes(ax)
    ticks: list[float] = []
    for method, left, at_input, in_layer in methods:
        ticks += [left + column for column in range(width)]
        for column, row in product(range(width), range(layers + 1)):
            cell = "of the text" if column >= virtual else in_layer if row else at_input
            if cell:
                corner = (left + column - 0.5, row - 0.5)
                ax.add_patch(Rectangle(corner, 1, 1, linewidth=0.7, **looks[cell]))
        ax.text(left + (width - 1) / 2, layers + 0.8, method, ha="center", fontsize=9)
    names = [""] * virtual + [token.strip() for token in tokens]
    ax.set_xticks(ticks, 2 * names, rotation=90)
    ax.tick_params(axis="x", labelsize=7.5, length=0)
    ax.set_yticks(range(layers + 1), ["input", *(f"layer {i}" for i in range(layers))])
    ax.set(xlim=(-0.7, 2 * width + 1.2), ylim=(-0.6, layers + 1.4))
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    legend_below(ax, handles=[Patch(**look) for look in looks.values()], ncols=2)
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
    ax.set(xlim=(0, WIDTH), ylim=(0, HEIGHT + 0.2))
    rounded = {"boxstyle": "round,pad=0,rounding_size=0.06", "edgecolor": "#555555"}
    for x, y, width, height, text in _BOXES:
        colour = "#f0f0f0" if text else "white"
        ax.add_patch(FancyBboxPatch((x, y), width, height, facecolor=colour, **rounded))
        middle = (x + width / 2, y + height / 2)
        ax.text(*middle, text, fontsize=8, ha="center", va="center")
    for start, end in ((0.77, 1.0), (1.85, 2.25), (3.5, 3.75), (4.8, 5.2)):
        ax.annotate("", (end, 2.3), (start, 2.3), arrowprops={"arrowstyle": "->"})
    ax.plot([1.0, 1.0, 4.95, 4.95], [3.0, 3.08, 3.08, 3.0], color="black", linewidth=1)
    ax.text(2.2, 2.77, "× L layers", fontsize=7.5, va="center")
    ax.text(4.08, 1.895, "beside any W", fontsize=7, va="center")
    circle = {"boxstyle": "circle,pad=0.25", "edgecolor": "white"}
    for index, (method, (x, y, trained)) in enumerate(_PLACES.items()):
        left, line = 0.12 + 3.05 * (index // 5), 1.42 - 0.3 * (index % 5)
        for place in ((x, y), (left, line)):
            look = {"color": "black" if method in _LIGHT else "white", "zorder": 5}
            look |= {"fontsize": 8 if index < 9 else 6, "weight": "bold"}
            look["bbox"] = circle | {"facecolor": METHOD_COLOURS[method]}
            ax.text(*place, str(index + 1), ha="center", va="center", **look)
        name = {"fontsize": 8, "weight": "bold", "va": "center"}
        ax.text(left + 0.17, line + 0.065, METHOD_NAMES[method], **name)
        what = {"fontsize": 7, "color": "#333333", "va": "center"}
        ax.text(left + 0.17, line - 0.075, trained, **what)
    return ax
