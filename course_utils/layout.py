"""A conversation becomes pieces of text, each of them learned or not.

`lay_out` uses one of the course's templates or the chat template that a tokenizer
carries; `course_utils.encoding` turns the pieces into token ids.
"""

from __future__ import annotations

import datetime
import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from course_utils.templates import Conversation, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Piece(NamedTuple):
    """A stretch of the rendered conversation."""

    text: str
    literal: bool  # True: words of the record, in which no special token is read
    learned: bool  # True: the model is trained to produce it


def lay_out(
    conversation: Conversation,
    template: Template,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Piece]:
    """The pieces of a conversation, from its first character to its last.

    A last exchange without an answer ends where the answer would begin. The
    beginning-of-sequence token of the built-in layouts is left to the tokenizer.

    Raises:
        ValueError: the layout needs a tokenizer, or this one cannot express it.
    """
    if template.name == "tokenizer":
        return _own_pieces(conversation, tokenizer)
    end, pieces = template.end, []
    if end is None and any(e.answer is not None for e in conversation.exchanges):
        end = getattr(tokenizer, "eos_token", None)
        if not end:
            raise ValueError(
                f"the {template.name} template ends an answer with the tokenizer's "
                "end-of-sequence token: "
                + ("it has none, set tokenizer.eos_token" if tokenizer else "pass one")
            )
    for i, exchange in enumerate(conversation.exchanges):
        if i:
            bos = template.repeat_bos and tokenizer and leading_bos(tokenizer)
            pieces.append(Piece(bos or template.between, False, False))
        system = _system_pieces(conversation, template, tokenizer) if i == 0 else []
        fills = {
            "{system}": system,
            "{text}": [Piece(exchange.text, True, False)],
            "{input}": _fill(template.input, exchange.input) if exchange.input else [],
        }
        for part in re.split(r"(\{\w+\})", template.turn):
            pieces += fills.get(part, [Piece(part, False, False)])
        if exchange.answer is not None:
            pieces += [Piece(exchange.answer, True, True), Piece(end, False, True)]
    return [piece for piece in pieces if piece.text]


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token that this tokenizer puts before every text by itself, if any."""
    first = tokenizer("").input_ids[:1]
    if first and first[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id):
        return tokenizer.convert_ids_to_tokens(first)[0]
    return None


def _fill(pattern: str, text: str) -> list[Piece]:
    before, _, after = pattern.partition("{text}")
    marks = Piece(before, False, False), Piece(after, False, False)
    return [marks[0], Piece(text, True, False), marks[1]]


def _system_pieces(
    conversation: Conversation, template: Template, tokenizer: Any
) -> list[Piece]:
    lead, default = "", template.default_system
    if template.input is not None and conversation.exchanges[0].input:
        default = template.default_system_with_input
    if template.name == "chatml" and getattr(tokenizer, "chat_template", None):
        before = _own_default_system(tokenizer, str(tokenizer.chat_template))
        if before is not None:
            lead, default = before.partition("<|im_start|>")[0], before
    if conversation.system is None:
        return [Piece(default, False, False)]
    return [Piece(lead, False, False), *_fill(template.system, conversation.system)]


# The caches below have the chat template as a key: it may be replaced.


@lru_cache(maxsize=8)
def _own_default_system(tokenizer: Any, _chat_template: str) -> str | None:
    """What the tokenizer's own template writes first, if it is ChatML; else None."""
    user = [{"role": "user", "content": "?"}]
    rendered = tokenizer.apply_chat_template(user, tokenize=False)
    before, found, _ = rendered.partition("<|im_start|>user\n?<|im_end|>")
    return before if found else None


def _render(tokenizer: Any, turns: list[dict[str, Any]], **options: Any) -> str:
    """The chat template's own text; ValueError where it refuses the chat."""
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except TemplateError as error:
        message = f"the chat template refuses this chat: {error}"
        raise ValueError(message) from error


_MARK = "\t\ue000{}\ue001\t"  # the tabs show whether the template strips what it gets
_MARKS = re.compile("(\t?)\ue000(\\d+)\ue001(\t?)")


class _OwnLayout(NamedTuple):
    first: str  # before the first turn's text
    turns: list[tuple[int, bool, bool, str]]  # which, strips left, right; what follows
    opening: str  # after the last user text when an answer is asked for
    ending: str  # after the last answer


@lru_cache(maxsize=256)
def _own_layout(
    tokenizer: Any, _chat_template: str, roles: tuple[str, ...], _day: datetime.date
) -> _OwnLayout:
    """Render the chat template, which may tell the day, with marks for the texts."""
    turns = [{"role": r, "content": _MARK.format(i)} for i, r in enumerate(roles)]
    first, *parts = _MARKS.split(_render(tokenizer, turns))
    split = [
        (int(parts[k + 1]), not parts[k], not parts[k + 2], parts[k + 3])
        for k in range(0, len(parts), 4)
    ]
    if sorted(turn[0] for turn in split) != list(range(len(roles))):
        raise ValueError("the chat template leaves out or repeats a turn of this chat")
    user = [{"role": "user", "content": _MARK.format(0)}]
    asking = _render(tokenizer, user, add_generation_prompt=True)
    ending = split[-1][3]
    if not ending.strip():
        raise ValueError("the chat template puts nothing after an answer to end it")
    return _OwnLayout(first, split, _MARKS.split(asking)[-1], ending)


def _own_pieces(conversation: Conversation, tokenizer: Any) -> list[Piece]:
    """Pieces of the tokenizer's own chat template.

    What it writes between its generation prompt and an answer is learned, since the
    model must produce that too.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the 'tokenizer' template needs a tokenizer with a chat template; "
            "this one has none: use 'chatml', 'alpaca', 'llama2' or 'plain'"
        )
    messages = []
    if conversation.system is not None:
        messages.append({"role": "system", "content": conversation.system})
    for exchange in conversation.exchanges:
        messages.append({"role": "user", "content": exchange.text})
        messages.append({"role": "assistant", "content": exchange.answer})
    roles = tuple(message["role"] for message in messages)
    today = datetime.date.today()
    layout = _own_layout(tokenizer, str(tokenizer.chat_template), roles, today)

    pieces, before = [], layout.first
    for index, strips_left, strips_right, after in layout.turns:
        text, answers = messages[index]["content"], roles[index] == "assistant"
        opening = before
        if answers and before.startswith(layout.opening):
            opening = layout.opening
        pieces.append(Piece(opening, False, False))
        if text is None:  # asked for, not given: the prompt ends here
            return [piece for piece in pieces if piece.text]
        text = text.lstrip() if strips_left else text
        text = text.rstrip() if strips_right else text
        if answers and not text:
            raise ValueError("nothing to learn: an answer is only white space")
        pieces.append(Piece(before[len(opening) :], False, True))
        pieces.append(Piece(text, True, answers))
        end = _common_start(after, layout.ending) if answers else ""
        pieces.append(Piece(end, False, True))
        before = after[len(end) :]
    pieces = [piece for piece in [*pieces, Piece(before, False, False)] if piece.text]
    rendered = _render(tokenizer, messages)
    if "".join(piece.text for piece in pieces) != rendered:
        raise ValueError("the chat template rewrites the text of this chat's turns")
    return pieces


def _common_start(a: str, b: str) -> str:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return a[:length]
