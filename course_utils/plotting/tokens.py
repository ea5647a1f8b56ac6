"""Figures of tokens: what is learned of them, and which of them see each other."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain, count, groupby
from typing import TYPE_CHECKING, Any

from course_utils.plotting.style import HEIGHT, finish, legend_below, new_axes

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
        glyphs = (font.get_char_index(ord(sign)) for font in _token_fonts()[1])
        drawable = unicodedata.category(sign)[0] != "C" and any(glyphs)
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
    `input_ids` are token ids (T,) or (B, T), lists or tensors, or the tokens' texts;
    `attention_mask` is 0 on padding. Raises ValueError: the shapes differ.
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

    def state(label: Any, seen: Any) -> str:
        return "padding" if not seen else "prompt" if label == -100 else "learned"

    return [[*map(state, *pair)] for pair in zip(rows, masks, strict=True)]


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
