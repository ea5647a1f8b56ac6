"""Prompt templates, the records that fill them, and the text that results.

`read_example` reads a record, whichever its columns, into a `Conversation`; `lay_out`
writes one as pieces of text, each of them learned or not, of which
`course_utils.formatting` makes token ids.
"""

from __future__ import annotations

import datetime
import itertools
import os.path
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ALPACA = (
    "Below is an instruction that describes a task{}. "
    "Write a response that appropriately completes the request.\n\n"
)


@dataclass(frozen=True)
class Template:
    """The layout of one conversation, with `{system}`, `{text}` and `{input}` in it."""

    name: str  # its key in `TEMPLATES`
    turn: str = ""  # a user turn and the header of the answer; `{system}` in the first
    system: str = ""  # what `{system}` becomes when there is system text
    end: str | None = None  # closes an answer; None: the tokenizer's end of sequence
    input: str | None = None  # `{input}`; None joins an input to the text, a line apart
    between: str = ""  # stands before each turn but the first
    default_system: str = ""  # the whole `{system}` where there is no system text
    default_system_with_input: str = ""  # the same for a record with an input
    repeat_bos: bool = False  # put the beginning of sequence before later turns, too


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
        "plain", "{system}Human: {text}\n\nAssistant: ", "{text}\n\n", between="\n\n"
    ),
    # Whatever chat template the tokenizer carries: see `_own_pieces`.
    "tokenizer": Template("tokenizer"),
}


class Exchange(NamedTuple):
    """One user turn and its answer (None: still to be given)."""

    text: str
    input: str
    answer: str | None


class Conversation(NamedTuple):
    """A record in one shape, whichever columns it came in."""

    system: str | None
    exchanges: tuple[Exchange, ...]

    def without_last_answer(self) -> Conversation:
        """The same conversation, its last answer still to be given."""
        *earlier, last = self.exchanges
        return self._replace(exchanges=(*earlier, last._replace(answer=None)))

    def cut(self, characters: int) -> Conversation:
        """Drop `characters` from the left: user text, then input, then system."""
        first, parts = self.exchanges[0], []
        for part in (first.text, first.input, self.system or ""):
            parts.append(part[characters:])
            characters = max(0, characters - len(part))
        shorter = first._replace(text=parts[0], input=parts[1])
        return Conversation(self.system and parts[2], (shorter, *self.exchanges[1:]))


def find_template(template: str | Template) -> Template:
    """The template of that name; ValueError lists the known names."""
    if isinstance(template, Template):
        return template
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}; use one of {[*TEMPLATES]}")
    return TEMPLATES[template]


def with_examples(
    template: str | Template, examples: Sequence[Mapping[str, str]], *, system: str
) -> Template:
    """A few-shot template: each conversation begins with the examples as its turns.

    `system` stands above them where a conversation has no system text of its own. Text
    of an example that looks like a marker becomes one. A template that ends answers
    with the tokenizer's token raises ValueError.
    """
    layout = find_template(template)
    if not layout.end:
        raise ValueError(f"the {layout.name} template has no end of turn of its own")
    shots = ""
    turn = layout.turn.replace("{system}", "").replace("{input}", "")
    for example in examples:
        prompt = turn.replace("{text}", example["prompt"])
        shots += prompt + example["completion"] + layout.end
    return replace(
        layout,
        name=f"{layout.name} with {len(examples)} examples",
        system=layout.system + shots,  # the examples stay below other system text
        default_system=layout.system.replace("{text}", system) + shots,
    )


def read_example(
    example: Mapping[str, Any], template: Template, system: str | None = None
) -> Conversation:
    """Read prompt + completion, instruction + input + output, or messages.

    The record's own system turn comes before `system`. A `prompt` and a `completion`
    that are texts are the record, whatever else stands beside them. Fields that are
    missing or no texts, and turns out of order, raise ValueError.
    """
    prompt, completion = example.get("prompt"), example.get("completion")
    is_pair = isinstance(prompt, str) and isinstance(completion, str)
    if isinstance(prompt, list):  # the conversational form of TRL
        answers = completion if isinstance(completion, list) else []
        return _read_messages(prompt + answers, system)
    if example.get("messages") is not None and not is_pair:
        return _read_messages(example["messages"], system)
    text, extra, answer = prompt, "", completion
    instruction, context = example.get("instruction"), example.get("input") or ""
    joined = (instruction, f"{instruction}\n\n{context}")  # as `load_examples` joins
    has_place = template.input is not None and instruction
    if text is None or (has_place and text in joined):
        text, extra = instruction, context
        answer = example.get("output") if completion is None else completion
    if text is None:
        fields = sorted(example)
        raise ValueError(f"no prompt, instruction or messages; its fields are {fields}")
    if template.input is None and extra:
        text, extra = f"{text}\n\n{extra}", ""
    for value in (text, extra, answer, system):
        if not isinstance(value, str | None):
            raise ValueError(f"expected text, found {type(value).__name__}: {value!r}")
    return Conversation(system, (Exchange(text, extra, answer),))


def first_misplaced_turn(roles: Sequence[str]) -> int | None:
    """Index of the first turn out of the order (system), user, assistant, user, ..."""
    begin = int(list(roles[:1]) == ["system"])
    due = itertools.cycle(("user", "assistant"))
    turns = enumerate(zip(roles[begin:], due, strict=False), begin)
    return next((i for i, (role, expected) in turns if role != expected), None)


def _read_messages(messages: list, system: str | None) -> Conversation:
    roles = [message["role"] for message in messages]
    texts = [message["content"] for message in messages]
    for role, text in zip(roles, texts, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"the {role} turn's content is not text: {text!r}")
    misplaced = first_misplaced_turn(roles)
    if roles and roles[0] == "system":
        roles, (system, *texts) = roles[1:], texts
    if not texts or misplaced is not None:
        raise ValueError(f"turns must alternate user, assistant, user; found {roles}")
    pairs = itertools.zip_longest(texts[::2], texts[1::2])
    return Conversation(system, tuple(Exchange(ask, "", reply) for ask, reply in pairs))


# --- from a conversation to pieces of text ---


class Piece(NamedTuple):
    """A stretch of the rendered conversation."""

    text: str
    literal: bool = False  # words of the record, in which no special token is read
    learned: bool = False  # the model is trained to produce it


def lay_out(
    conversation: Conversation,
    template: Template,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Piece]:
    """The pieces of a conversation, from its first character to its last.

    A last exchange without an answer ends where the answer would begin. A built-in
    layout leaves the beginning-of-sequence token to the tokenizer. A layout that the
    tokenizer cannot express raises ValueError.
    """
    if template.name == "tokenizer":
        return _own_pieces(conversation, tokenizer)
    answered = any(exchange.answer is not None for exchange in conversation.exchanges)
    end = _end_of_answer(template, tokenizer) if answered else ""
    pieces = []
    for i, exchange in enumerate(conversation.exchanges):
        if i:
            bos = template.repeat_bos and tokenizer and leading_bos(tokenizer)
            pieces.append(Piece(bos or template.between))
        system = _system_pieces(conversation, template, tokenizer) if i == 0 else []
        fills = {
            "{system}": system,
            "{text}": [Piece(exchange.text, literal=True)],
            "{input}": _fill(template.input, exchange.input) if exchange.input else [],
        }
        for part in re.split(r"(\{\w+\})", template.turn):
            pieces += fills.get(part, [Piece(part)])
        if exchange.answer is not None:
            pieces.append(Piece(exchange.answer, literal=True, learned=True))
            pieces.append(Piece(end, learned=True))
    return pieces


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token that this tokenizer puts before every text by itself, if any."""
    first = tokenizer("").input_ids[:1]
    if first and first[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id):
        return tokenizer.convert_ids_to_tokens(first)[0]
    return None


def _end_of_answer(template: Template, tokenizer: Any) -> str:
    if template.end is not None:
        return template.end
    if end := getattr(tokenizer, "eos_token", None):
        return end
    cure = "it has none, set tokenizer.eos_token" if tokenizer else "pass one"
    raise ValueError(f"the {template.name} template ends answers with eos: {cure}")


def _fill(pattern: str, text: str) -> list[Piece]:
    before, _, after = pattern.partition("{text}")
    return [Piece(before), Piece(text, literal=True), Piece(after)]


def _system_pieces(
    conversation: Conversation, template: Template, tokenizer: Any
) -> list[Piece]:
    lead, default = "", template.default_system
    if template.input is not None and conversation.exchanges[0].input:
        default = template.default_system_with_input
    if template.name == "chatml" and getattr(tokenizer, "chat_template", None):
        own = _own_default_system(tokenizer, str(tokenizer.chat_template))
        if own is not None:
            lead, default = own.partition("<|im_start|>")[0], own
    if conversation.system is None:
        return [Piece(default)]
    return [Piece(lead), *_fill(template.system, conversation.system)]


# --- the chat template that a tokenizer carries ---
# The caches have its text as a key: it may be replaced.


@lru_cache(maxsize=8)
def _own_default_system(tokenizer: Any, _chat_template: str) -> str | None:
    """What the tokenizer's own template writes first, if it is ChatML; else None."""
    user = [{"role": "user", "content": "?"}]
    rendered = tokenizer.apply_chat_template(user, tokenize=False)
    before, turn, _ = rendered.partition("<|im_start|>user\n?<|im_end|>")
    return before if turn else None


def _render(tokenizer: Any, turns: list[dict[str, Any]], **options: Any) -> str:
    """The chat template's own text; ValueError where it refuses the chat."""
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses this chat: {error}") from error


_MARK = "\t\ue000{}\ue001\t"  # the tabs show whether the template strips what it gets
_MARKS = re.compile("(\t?)\ue000(\\d+)\ue001(\t?)")


class _OwnTurn(NamedTuple):
    index: int  # among the messages
    keeps_left: str  # empty where the template strips the text on this side
    keeps_right: str
    after: str  # what follows the text


class _OwnLayout(NamedTuple):
    first: str  # before the first turn's text
    turns: list[_OwnTurn]
    opening: str  # after the last user text when an answer is asked for
    ending: str  # after the last answer


@lru_cache(maxsize=256)
def _own_layout(
    tokenizer: Any, _chat_template: str, roles: tuple[str, ...], _day: datetime.date
) -> _OwnLayout:
    """Render the chat template, which may tell the day, with marks for the texts."""
    marked = [{"role": r, "content": _MARK.format(i)} for i, r in enumerate(roles)]
    first, *parts = _MARKS.split(_render(tokenizer, marked))
    fields = zip(*(parts[k::4] for k in range(4)), strict=True)
    turns = [_OwnTurn(int(i), left, right, after) for left, i, right, after in fields]
    if sorted(turn.index for turn in turns) != list(range(len(roles))):
        raise ValueError("the chat template leaves out or repeats a turn of this chat")
    user = [{"role": "user", "content": _MARK.format(0)}]
    asking = _render(tokenizer, user, add_generation_prompt=True)
    ending = turns[-1].after
    if not ending.strip():
        raise ValueError("the chat template puts nothing after an answer to end it")
    return _OwnLayout(first, turns, _MARKS.split(asking)[-1], ending)


def _own_pieces(conversation: Conversation, tokenizer: Any) -> list[Piece]:
    """Pieces of the tokenizer's own chat template.

    What it writes between its generation prompt and an answer is learned, since the
    model must produce that too.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("this tokenizer has no chat template: use 'alpaca' or 'plain'")
    turns = [] if conversation.system is None else [("system", conversation.system)]
    for exchange in conversation.exchanges:
        turns += [("user", exchange.text), ("assistant", exchange.answer)]
    messages = [{"role": role, "content": content} for role, content in turns]
    roles = tuple(role for role, _ in turns)
    today = datetime.date.today()
    layout = _own_layout(tokenizer, str(tokenizer.chat_template), roles, today)

    pieces, before = [], layout.first
    for turn in layout.turns:
        role, content = turns[turn.index]
        is_answer, opening = role == "assistant", before
        if is_answer and before.startswith(layout.opening):
            opening = layout.opening
        pieces.append(Piece(opening))
        if content is None:  # asked for, not given: the prompt ends here
            return pieces
        text = content if turn.keeps_left else content.lstrip()
        text = text if turn.keeps_right else text.rstrip()
        if is_answer and not text:
            raise ValueError("nothing to learn: an answer is only white space")
        end = os.path.commonprefix([turn.after, layout.ending]) if is_answer else ""
        pieces.append(Piece(before[len(opening) :], learned=True))
        pieces.append(Piece(text, literal=True, learned=is_answer))
        pieces.append(Piece(end, learned=True))
        before = turn.after[len(end) :]
    pieces.append(Piece(before))
    if "".join(piece.text for piece in pieces) != _render(tokenizer, messages):
        raise ValueError("the chat template rewrites the text of this chat's turns")
    return pieces
