"""The text of a token, made drawable in any language with the fonts at hand."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

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
