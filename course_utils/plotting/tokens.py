"""The course in one picture: where each method puts what it trains."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
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

# --- figure_text ---
# The text of a token, made drawable in any language with the fonts at hand.

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


@lru_cache(maxsize=1)
def token_fonts() -> tuple[list[str], list[Any]]:
    """Font families to draw tokens with, and their opened files."""
    from matplotlib import font_manager, ft2font

    installed = {font.name: font.fname for font in font_manager.fontManager.ttflist}
    names = ["DejaVu Sans Mono", "DejaVu Sans"]
    names += [name for name in _CJK_FONTS if name in installed][:1]
    files = [font_manager.findfont(name) for name in names]
    return names, [ft2font.FT2Font(file) for file in files]


def visible(text: str, *, spaces: bool = False) -> str:
    """Make a token's text drawable: signs for white space, escapes for the rest.

    A character that no font at hand has is written as its escape, so that drawing it
    warns of no missing glyph.

    Args:
        text: any text.
        spaces: keep spaces as they are.

    Examples:
        >>> visible(" on" + chr(10))
        '␣on↵'
    """
    fonts = token_fonts()[1]
    shown = []
    for char in text:
        sign = char if spaces and char == " " else _SIGNS.get(char, char)
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


def _bytes_of(name: str) -> str:
    letters = _byte_letters()
    if all(letter in letters for letter in name):
        return "".join(rf"\x{letters[letter]:02x}" for letter in name)
    return name


def token_texts(input_ids: Sequence[Any], tokenizer: Any = None) -> list[str]:
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
                text = _bytes_of(name)
            elif name.startswith("▁") and not text.startswith(" "):
                text = " " + text
        texts.append(visible(text) or "∅")
    return texts


# --- figure_tokens ---
# Figures of tokens: label masks and attention masks. `plotting` offers them.

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


# --- figure_prefix ---
# Where prompt and prefix tuning put what they learn. `plotting` offers it.

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
