"""Pieces of text become token ids and labels.

Markers may hold special tokens; the texts of a record never do, whatever they look
like.
"""

from __future__ import annotations

import copy
import re
from functools import lru_cache
from typing import Any, NamedTuple

from course_utils.layout import Piece, leading_bos
from course_utils.templates import Template

IGNORE = -100  # the label that torch's cross-entropy leaves out (its ignore_index)


class Special(NamedTuple):
    """A token that the tokenizer cuts out of a text before it splits the rest."""

    id: int
    special: bool  # False: an added token that is ordinary vocabulary
    lstrip: bool
    rstrip: bool


class _Run(NamedTuple):
    part: int | str  # a special token's id, or text to tokenize
    learned: bool
    literal: bool  # holds words of the record


@lru_cache(maxsize=8)
def special_tokens(tokenizer: Any, size: int) -> tuple[dict[str, Special], re.Pattern]:
    """Tokens outside the ordinary vocabulary, and a pattern to split text at them.

    `size`, the number of tokens, is there for the cache: tokens may be added.
    """
    tokens = {
        token.content: Special(i, token.special, token.lstrip, token.rstrip)
        for i, token in tokenizer.added_tokens_decoder.items()
    }
    ids = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    for text, i in ids:
        known = tokens.get(text, Special(i, True, False, False))
        tokens[text] = known._replace(special=True)
    names = sorted(tokens, key=len, reverse=True)
    return tokens, re.compile("(" + "|".join(map(re.escape, names)) + ")")


@lru_cache(maxsize=8)
def _within_text(tokenizer: Any) -> tuple[Any, bool]:
    """The tokenizer without the space that it puts before a text's first word.

    Second: whether it puts that space at the very start only, else also after each
    special token. A tokenizer that puts none is returned as it is.
    """
    from tokenizers import normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Metaspace

    def steps(backend: Any) -> list:
        chain = isinstance(backend.normalizer, normalizers.Sequence)
        return list(backend.normalizer) if chain else []

    split = tokenizer.backend_tokenizer.pre_tokenizer
    metaspace = isinstance(split, Metaspace) and split.prepend_scheme != "never"
    byte_level = isinstance(split, ByteLevel) and split.add_prefix_space
    names = [type(step).__name__ for step in steps(tokenizer.backend_tokenizer)]
    older = names == ["Prepend", "Replace"]  # older SentencePiece conversions
    if not (metaspace or byte_level or older):
        return tokenizer, False
    first_only = metaspace and split.prepend_scheme == "first"
    other = copy.deepcopy(tokenizer)
    if metaspace:
        other.backend_tokenizer.pre_tokenizer.prepend_scheme = "never"
    elif byte_level:
        other.backend_tokenizer.pre_tokenizer.add_prefix_space = False
    else:
        other.backend_tokenizer.normalizer = steps(other.backend_tokenizer)[1]
    return other, first_only


def encode(
    pieces: list[Piece], layout: Template, tokenizer: Any
) -> tuple[list[int], list[int]]:
    """Token ids and labels of laid-out pieces."""
    special, pattern = special_tokens(tokenizer, len(tokenizer))
    if layout.name == "chatml" and "<|im_end|>" not in special:
        raise ValueError(
            "this tokenizer has no <|im_start|> and <|im_end|> tokens: use "
            "template='tokenizer' (its own chat template), 'alpaca' or 'plain'"
        )
    runs = _runs(pieces, special, pattern)
    never = {token.id for token in special.values() if token.special}
    never |= {run.part for run in runs if isinstance(run.part, int)}
    # Blank lines that are tokens of their own (Gemma's) forge nothing.
    never -= {t.id for name, t in special.items() if not name.strip() and not t.special}
    never.discard(tokenizer.unk_token_id)
    within, first_only = _within_text(tokenizer)

    def encoder(i: int) -> Any:
        after_token = i == 0 or isinstance(runs[i - 1].part, int)
        return tokenizer if i == 0 or (after_token and not first_only) else within

    encoded: dict[int, list[int]] = {}
    words = [i for i, run in enumerate(runs) if run.literal]
    for each in {id(t): t for t in map(encoder, words)}.values():
        mine = [i for i in words if encoder(i) is each]
        lists = _encode_texts([runs[i].part for i in mine], each, special, never)
        encoded |= zip(mine, lists, strict=True)
    bos = None if layout.end or layout.name == "tokenizer" else leading_bos(tokenizer)
    ids: list[int] = [special[bos].id] if bos else []
    labels = [IGNORE] * len(ids)
    for i, run in enumerate(runs):
        if isinstance(run.part, int):
            new = [run.part]
        elif run.literal:
            new = encoded[i]
        else:
            new = _marker_ids(encoder(i), run.part)
        if run.literal and run.learned and not new:
            raise ValueError(f"nothing to learn: no token stands for {run.part!r}")
        ids += new
        labels += new if run.learned else [IGNORE] * len(new)
    return ids, labels


def _runs(
    pieces: list[Piece], special: dict[str, Special], pattern: re.Pattern
) -> list[_Run]:
    """Join neighbouring texts, so that they are tokenized as in the whole rendering."""
    runs: list[_Run] = []
    strip = False  # a special token may swallow the white space that follows it
    for piece in pieces:
        for part in [piece.text] if piece.literal else pattern.split(piece.text):
            token = None if piece.literal else special.get(part)
            if token:
                if token.lstrip and runs and isinstance(runs[-1].part, str):
                    runs[-1] = runs[-1]._replace(part=runs[-1].part.rstrip())
                runs.append(_Run(token.id, piece.learned, False))
                strip = token.rstrip
                continue
            part = part.lstrip() if strip else part
            if not part:
                continue
            strip = False
            last = runs[-1] if runs else None
            if last and isinstance(last.part, str) and last.learned == piece.learned:
                literal = last.literal or piece.literal
                runs[-1] = _Run(last.part + part, last.learned, literal)
            else:
                runs.append(_Run(part, piece.learned, piece.literal))
    return runs


@lru_cache(maxsize=1024)
def _marker_ids(tokenizer: Any, text: str) -> list[int]:
    return _encode_texts([text], tokenizer, {}, set())[0]


def _encode_texts(
    texts: list[str], tokenizer: Any, special: dict[str, Special], never: set[int]
) -> list[list[int]]:
    """Ids of texts in which nothing is read as a token of the set `never`."""
    if not texts:
        return []
    encoded = _plain_ids(texts, tokenizer)
    for i, ids in enumerate(encoded):
        if not never.isdisjoint(ids):
            encoded[i] = _encode_apart(texts[i], ids, tokenizer, special, never)
    return encoded


def _plain_ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


def _encode_apart(
    text: str, ids: list[int], tokenizer: Any, special: dict, never: set[int]
) -> list[int]:
    """Break look-alikes after their first character where the vocabulary holds it."""
    done: list[int] = []
    while not never.isdisjoint(ids):
        places = [
            text.find(name) + 1
            for name, token in special.items()
            if token.id in never and token.id in ids and len(name) > 1
        ]
        at = min((place for place in places if place), default=0)
        if not at:
            break
        done += _plain_ids([text[:at]], tokenizer)[0]  # before it there is none
        tokenizer, text = _within_text(tokenizer)[0], text[at:]
        ids = _plain_ids([text], tokenizer)[0]
    return done + ids
