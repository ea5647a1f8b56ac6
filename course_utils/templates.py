"""Prompt templates: a record becomes pieces of text, each learned or not.

A template decides what stands around the user's words. Here a record is laid out as
a list of `Piece`; `course_utils.formatting` turns the pieces into token ids.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ALPACA = (
    "Below is an instruction that describes a task{}. "
    "Write a response that appropriately completes the request.\n\n"
)


@dataclass(frozen=True)
class Template:
    """The layout of one conversation.

    Attributes:
        name: its key in `TEMPLATES`.
        turn: one user turn and the header of the answer; `{system}` (first turn
            only), `{text}` and `{input}` are filled in.
        system: what `{system}` becomes when there is system text.
        end: closes each answer; None means the tokenizer's end-of-sequence token.
        input: what `{input}` becomes; None joins an input to the text by a blank line.
        between: stands before each turn but the first.
        default_system: the whole `{system}` when the record has no system text.
        default_system_with_input: the same for a record with an input.
        repeat_bos: put the beginning-of-sequence token before later turns too.
    """

    name: str
    turn: str = ""
    system: str = ""
    end: str | None = None
    input: str | None = None
    between: str = ""
    default_system: str = ""
    default_system_with_input: str = ""
    repeat_bos: bool = False


TEMPLATES: Mapping[str, Template] = {
    # The built-in model's own format (its tokenizer's chat template).
    "chatml": Template(
        "chatml",
        turn="{system}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
        system="<|im_start|>system\n{text}<|im_end|>\n",
        end="<|im_end|>\n",
        default_system="<|im_start|>system\nYou are a helpful AI assistant named "
        "SmolLM, trained by Hugging Face<|im_end|>\n",
    ),
    # github.com/tatsu-lab/stanford_alpaca, train.py
    "alpaca": Template(
        "alpaca",
        turn="{system}### Instruction:\n{text}{input}\n\n### Response:\n",
        system="{text}\n\n",
        input="\n\n### Input:\n{text}",
        between="\n\n",
        default_system=_ALPACA.format(""),
        default_system_with_input=_ALPACA.format(
            ", paired with an input that provides further context"
        ),
    ),
    # github.com/meta-llama/llama, llama/generation.py
    "llama2": Template(
        "llama2",
        turn="[INST] {system}{text} [/INST] ",
        system="<<SYS>>\n{text}\n<</SYS>>\n\n",
        repeat_bos=True,
    ),
    "plain": Template(
        "plain",
        turn="{system}Human: {text}\n\nAssistant: ",
        system="{text}\n\n",
        between="\n\n",
    ),
    # Whatever chat template the tokenizer carries; see `_own_pieces`.
    "tokenizer": Template("tokenizer"),
}


class Piece(NamedTuple):
    """A stretch of the rendered conversation."""

    text: str
    literal: bool  # True: words of the record, in which no special token is read
    learned: bool  # True: the model is trained to produce it


@dataclass(frozen=True)
class Exchange:
    """One user turn and its answer (None: still to be given)."""

    text: str
    input: str
    answer: str | None


@dataclass(frozen=True)
class Conversation:
    """A record in one shape, whichever columns it came in."""

    system: str | None
    exchanges: tuple[Exchange, ...]

    @property
    def prompt_characters(self) -> int:
        """Characters of the record's own text in the prompt of a single exchange."""
        first = self.exchanges[0]
        return len(first.text) + len(first.input) + len(self.system or "")

    def cut(self, characters: int) -> Conversation:
        """Drop `characters` from the left: user text, then input, then system."""
        first = self.exchanges[0]
        text = first.text[characters:]
        characters = max(0, characters - len(first.text))
        shorter = replace(first, text=text, input=first.input[characters:])
        characters = max(0, characters - len(first.input))
        system = self.system[characters:] if self.system else self.system
        return Conversation(system, (shorter, *self.exchanges[1:]))


def find_template(template: str | Template) -> Template:
    """The template of that name; ValueError lists the known names."""
    if isinstance(template, Template):
        return template
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}; use one of {[*TEMPLATES]}")
    return TEMPLATES[template]


def read_example(
    example: Mapping[str, Any], template: Template, system: str | None = None
) -> Conversation:
    """Read prompt + completion, instruction + input + output, or messages.

    The record's own system turn comes before `system`.

    Raises:
        ValueError: the record has none of these, a value is not text, or its turns do
            not alternate user, assistant, user, ...
    """
    prompt, completion = example.get("prompt"), example.get("completion")
    messages = example.get("messages")
    if isinstance(prompt, list):  # the conversational form of TRL
        messages = prompt + (completion if isinstance(completion, list) else [])
    if messages is not None:
        return _read_messages(messages, system)
    text, extra, answer = prompt, "", completion
    if text is None or (template.input is not None and example.get("instruction")):
        text, extra = example.get("instruction"), example.get("input") or ""
        answer = example.get("output") if completion is None else completion
    if text is None:
        raise ValueError(
            "no prompt, instruction or messages in this record; "
            f"its fields are {sorted(example)}"
        )
    if template.input is None and extra:
        text, extra = f"{text}\n\n{extra}", ""
    for value in (text, extra, answer, system):
        if not isinstance(value, str | None):
            raise ValueError(f"expected text, found {type(value).__name__}: {value!r}")
    return Conversation(system, (Exchange(text, extra, answer),))


def _read_messages(messages: list, system: str | None) -> Conversation:
    turns = [(message["role"], message["content"]) for message in messages]
    for role, content in turns:
        if not isinstance(content, str):
            raise ValueError(f"the {role} turn's content is not text: {content!r}")
    if turns and turns[0][0] == "system":
        system = turns.pop(0)[1]
    roles = [role for role, _ in turns]
    if not turns or roles != (["user", "assistant"] * len(turns))[: len(turns)]:
        raise ValueError(
            "after an optional system turn, turns must alternate user, assistant, "
            f"beginning with user; found {roles}"
        )
    texts = [content for _, content in turns]
    answers = [*texts[1::2], None] if len(texts) % 2 else texts[1::2]
    pairs = zip(texts[::2], answers, strict=True)
    return Conversation(system, tuple(Exchange(text, "", a) for text, a in pairs))


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
            "{input}": _fill(template.input or "", exchange.input),
        }
        if not exchange.input:
            fills["{input}"] = []
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
    return [Piece(before, False, False), Piece(text, True, False)] + [
        Piece(after, False, False)
    ]


def _system_pieces(
    conversation: Conversation, template: Template, tokenizer: Any
) -> list[Piece]:
    lead, default = "", template.default_system
    if template.input is not None and conversation.exchanges[0].input:
        default = template.default_system_with_input
    if template.name == "chatml" and getattr(tokenizer, "chat_template", None):
        # What the tokenizer's own template writes, if that is ChatML too.
        user = [{"role": "user", "content": "?"}]
        rendered = tokenizer.apply_chat_template(user, tokenize=False)
        before, found, _ = rendered.partition("<|im_start|>user\n?<|im_end|>")
        if found:
            lead, default = before.partition("<|im_start|>")[0], before
    if conversation.system is None:
        return [Piece(default, False, False)]
    return [Piece(lead, False, False), *_fill(template.system, conversation.system)]


_MARK = "\t\ue000{}\ue001\t"  # the tabs show whether the template strips what it gets
_MARKS = re.compile("(\t?)\ue000(\\d+)\ue001(\t?)")


def _own_pieces(conversation: Conversation, tokenizer: Any) -> list[Piece]:
    """Pieces of the tokenizer's own chat template.

    The template is rendered with marks in place of the texts. What it writes between
    its generation prompt and an answer is learned, since the model must produce it.
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
        if exchange.answer is not None:
            messages.append({"role": "assistant", "content": exchange.answer})
    open_ended = messages[-1]["role"] == "user"
    if open_ended:  # rendered with an answer, so that both parts always agree
        messages.append({"role": "assistant", "content": "?"})

    def render(messages: list[dict], **options: Any) -> str:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    marked = [
        {"role": m["role"], "content": _MARK.format(i)} for i, m in enumerate(messages)
    ]
    parts = _MARKS.split(render(marked))
    if sorted(parts[2::4]) != sorted(str(i) for i in range(len(messages))):
        raise ValueError("the chat template leaves out or repeats a turn of this chat")
    user = [{"role": "user", "content": _MARK.format(0)}]
    opening = _MARKS.split(render(user, add_generation_prompt=True))[-1]
    ending = parts[-1]
    if not ending.strip():
        raise ValueError("the chat template puts nothing after an answer to end it")

    pieces = [Piece(parts[0], False, False)]
    for k in range(1, len(parts), 4):
        left, index, right, marker = parts[k : k + 4]
        message = messages[int(index)]
        text, answers = message["content"], message["role"] == "assistant"
        text = text if left else text.lstrip()
        text = text if right else text.rstrip()
        if answers and pieces[-1].text.startswith(opening):
            before = pieces.pop().text
            pieces.append(Piece(opening, False, False))
            pieces.append(Piece(before[len(opening) :], False, True))
        if answers and open_ended and int(index) == len(messages) - 1:
            pieces = pieces[:-1] if pieces[-1].learned else pieces
            return [piece for piece in pieces if piece.text]
        pieces.append(Piece(text, True, answers))
        end = _common_start(marker, ending) if answers else ""
        pieces += [Piece(end, False, True), Piece(marker[len(end) :], False, False)]
    pieces = [piece for piece in pieces if piece.text]
    if "".join(piece.text for piece in pieces) != render(messages):
        raise ValueError("the chat template rewrites the text of this chat's turns")
    return pieces


def _common_start(a: str, b: str) -> str:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return a[:length]
