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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ALPACA = "Below is an instruction that describes a task{}. "
_ALPACA += "Write a response that appropriately completes the request.\n\n"


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
    example: Mapping[str, Any], template: str | Template, system: str | None = None
) -> Conversation:
    """Read prompt + completion, instruction + input + output, or messages.

    The record's own system turn, or `system` column, comes before `system`. A `prompt`
    and a `completion` that are texts are the record, whatever else stands beside them,
    but `messages` that end in the two hold what was said before. Fields that are
    missing, no texts or not learned, and turns out of order, raise ValueError.
    """
    template = find_template(template)
    unread = [n for n in example if UNREAD.fullmatch(n) and _says_something(example[n])]
    if unread:
        cure = "write what it says into a text, or take it out"
        raise ValueError(f"{', '.join(unread)} would not be learned: {cure}")
    if _says_something(example.get("system")):
        system = example["system"]
    prompt, completion = example.get("prompt"), example.get("completion")
    chat = example.get("messages")
    turns = _as_turns("user", prompt) + _as_turns("assistant", completion)
    if isinstance(prompt, list) or isinstance(completion, list):  # as TRL has them
        return _read_messages(turns, system)
    is_pair = isinstance(prompt, str) and isinstance(completion, str)
    if chat is not None and not is_pair:
        return _read_messages(chat, system)

    last = _read_fields(example, template)
    for value in (*last, system):
        if not isinstance(value, str | None):
            raise ValueError(f"expected text, found {type(value).__name__}: {value!r}")
    if isinstance(chat, list) and chat[-2:] == turns:
        told = _read_messages(chat, system)
        return told._replace(exchanges=(*told.exchanges[:-1], last))
    if _says_something(example.get("system_prompt")):
        raise ValueError("system_prompt: put it into messages")
    return Conversation(system, (last,))


# Fields of turns that may stand there, and columns that would not be learned.
OF_TURNS = re.compile("role|content|id|index|turn|timestamp|date|source|url|score")
UNREAD = re.compile(
    r"rejected|kto_tag|(chat_|conversation_)?history|(available_)?tools|functions?|"
    r"(tool|function)_(calls?|schema)|tool_call_id|chat_template_kwargs|attachments|"
    r"(image|video|audio)s?(_path|_url)?|reasoning(_content|_text|_steps)?|thinking"
)


def _as_turns(role: str, said: Any) -> list:
    if isinstance(said, list):
        return said
    return [] if said is None else [{"role": role, "content": said}]


def _read_fields(example: Mapping[str, Any], template: Template) -> Exchange:
    """Read prompt + completion, or instruction + input + output.

    Where both stand and the template has a place for the input, the latter are read.
    """
    text, extra, answer = example.get("prompt"), "", example.get("completion")
    instruction, context = example.get("instruction"), example.get("input") or ""
    joined = (instruction, f"{instruction}\n\n{context}")  # as `load_examples` joins
    has_place = template.input is not None and instruction
    if text is None or (has_place and text in joined):
        text, extra = instruction, context
        answer = example.get("output") if answer is None else answer
    if text is None:
        fields = sorted(example)
        raise ValueError(f"no prompt, instruction or messages; its fields are {fields}")
    if template.input is None and extra:
        text, extra = f"{text}\n\n{extra}", ""
    return Exchange(text, extra, answer)


def _says_something(value: Any) -> bool:
    nothing = ("", "null", "nan", "[]", "{}")
    return value is not None and str(value).strip() not in nothing


def first_misplaced_turn(roles: Sequence[str]) -> int | None:
    """Index of the first turn out of the order (system), user, assistant, user, ..."""
    begin = int(list(roles[:1]) == ["system"])
    due = itertools.cycle(("user", "assistant"))
    turns = enumerate(zip(roles[begin:], due, strict=False), begin)
    return next((i for i, (role, expected) in turns if role != expected), None)


def _read_messages(messages: list, system: str | None) -> Conversation:
    roles, texts = [], []
    for number, turn in enumerate(messages, start=1):
        filled = {name for name, value in turn.items() if _says_something(value)}
        filled = {name for name in filled if not OF_TURNS.fullmatch(name)}
        if unread := ", ".join(sorted(filled)):
            fault = f"{unread} of turn {number} would not be learned"
            raise ValueError(f"{fault}: write it into the content, or take it out")
        role, content, text = turn.get("role"), turn.get("content"), ""
        parts = content if isinstance(content, list) else [content]
        for part in parts:
            if isinstance(part, dict) and part.get("type") == "text":
                part = part.get("text")
            if not isinstance(part, str):
                raise ValueError(f"the {role} turn's content is not text: {content!r}")
            text += part
        roles.append(role)
        texts.append(text)
    misplaced = first_misplaced_turn(roles)
    if roles and roles[0] == "system":
        roles, (own, *texts) = roles[1:], texts
        system = own if own.strip() else system
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
    template: str | Template,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[Piece]:
    """The pieces of a conversation, from its first character to its last.

    A last exchange without an answer ends where the answer would begin. A built-in
    layout leaves the beginning-of-sequence token to the tokenizer. A layout that the
    tokenizer cannot express raises ValueError.
    """
    template = find_template(template)
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
    if template.name == "chatml" and tokenizer:  # its model's, not the built-in one's
        try:
            user = (("user", _MARK.format(0)),)
            own = _own_layout(tokenizer, _state(tokenizer), user)[0]
        except ValueError:  # it carries no template, or one that asks for more
            own = ""
        default, is_chatml, _ = own.partition("<|im_start|>user\n")
        default = default if is_chatml else ""
        lead = default.partition("<|im_start|>")[0]
    if conversation.system is None:
        return [Piece(default)]
    return [Piece(lead), *_fill(template.system, conversation.system)]


# --- the chat template that a tokenizer carries ---
# What a template reads is a key of the caches, beside the tokenizer: it may change.


def _state(tokenizer: Any) -> tuple:
    """What a rendering depends on: the template, the special tokens, and the day."""
    special = tuple(tokenizer.special_tokens_map.items())
    return str(tokenizer.chat_template), special, datetime.date.today()


def _render(tokenizer: Any, turns: Iterable[tuple[str, str]], **options: Any) -> str:
    """The chat template's own text of (role, content)s; ValueError: it refuses them."""
    from jinja2.exceptions import TemplateError

    chat = [{"role": role, "content": content} for role, content in turns]
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, **options)
    except TemplateError as error:
        raise _refusal(f"refuses this chat: {error}; mend it") from error


def _refusal(fault: str) -> ValueError:
    cure = "use template='plain' ('chatml' if the tokenizer has its tokens)"
    return ValueError(f"the chat template {fault}, or {cure}")


_MARK = "\ue000{}\ue001"
_MARKS = re.compile("\ue000(\\d+)\ue001")


@lru_cache(maxsize=256)
def _own_layout(
    tokenizer: Any, _state: tuple, marked: tuple[tuple[str, str], ...]
) -> tuple[str, list[tuple[int, str]], str]:
    """Render the chat template with a mark for each text of the (role, content)s.

    Returns what stands before the texts, (number, what follows) of each in the order
    of the rendering, and what follows a user's text where an answer is asked for.
    """
    before, *rest = _MARKS.split(_render(tokenizer, marked))
    numbers, follows = [int(number) for number in rest[::2]], rest[1::2]
    if not rest or len(set(numbers)) < len(numbers):
        raise _refusal("leaves out or repeats a turn of this chat: mend it")
    if not follows[-1].strip():
        raise _refusal("puts nothing after an answer to end it: mend it")
    user = [("user", _MARK.format(0))]
    asking = _render(tokenizer, user, add_generation_prompt=True)
    return before, list(zip(numbers, follows, strict=True)), _MARKS.split(asking)[-1]


def _own_pieces(conversation: Conversation, tokenizer: Any) -> list[Piece]:
    """Pieces of the tokenizer's own chat template, which may strip texts.

    What it writes after its generation prompt is learned, the tags of a thought, too:
    the model must produce that. Where an answer is asked for, it may drop thoughts.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("this tokenizer has no chat template: use 'alpaca' or 'plain'")
    turns = [] if conversation.system is None else [("system", conversation.system)]
    for exchange in conversation.exchanges:
        turns += [("user", exchange.text), ("assistant", exchange.answer)]
    asks = turns[-1][1] is None
    if asks:  # what stands before an answer is the same before any
        turns[-1] = ("assistant", ".")
    rendered, state = _render(tokenizer, turns), _state(tokenizer)
    texts, marked = _mark(turns)
    before, places, asking = _own_layout(tokenizer, state, marked)
    shown = dict(places)
    for number, (turn, text) in enumerate(texts):
        if number not in shown and not (asks and turns[turn][0] == "assistant"):
            fault = f"leaves out {text[:30]!r} of turn {turn + 1}: take it out"
            raise _refusal(f"{fault}, end a record with that turn")
    # What follows each turn where no answer brings a thought of its own.
    bare = tuple((role, _MARK.format(i)) for i, (role, _) in enumerate(turns))
    follows = dict(_own_layout(tokenizer, state, bare)[1])
    ending = places[-1][1]

    pieces, at = [], len(before)  # `at`: how much of the rendering is in the pieces
    for turn, group in itertools.groupby(places, lambda place: texts[place[0]][0]):
        is_answer, opening = turns[turn][0] == "assistant", before
        if is_answer:
            opening = _opening(before, follows[turn - 1], asking, turn)
        pieces.append(Piece(opening))
        if asks and turn == len(turns) - 1:
            return pieces
        before = before[len(opening) :]
        for number, after in group:
            text = _as_written(texts[number][1], rendered, at, after)
            at += len(text) + len(after)
            if is_answer and not text and not turns[turn][1].strip():
                raise ValueError("nothing to learn: an answer is only white space")
            pieces.append(Piece(before, learned=True))
            pieces.append(Piece(text, literal=True, learned=is_answer))
            before = after
        if is_answer:
            end = _end_of_own(before, ending)
            pieces.append(Piece(end, learned=True))
            before = before[len(end) :]
    if at != len(rendered):
        raise _refusal("rewrites the end of this chat: change that")
    return [*pieces, Piece(before)]


def _opening(before: str, follows_user: str, asking: str, turn: int) -> str:
    """The part of what stands before an answer that the model does not write."""
    opening = asking if follows_user.startswith(asking) else follows_user
    if not before.startswith(opening) or before.count("<think>") > 1:
        raise _refusal(f"has its own thought in turn {turn + 1}: take the record's out")
    return opening


def _end_of_own(after: str, ending: str) -> str:
    """The part of what follows an answer that ends it: as the last answer ends."""
    end = os.path.commonprefix([after, ending])  # less what is no whole marker
    return end if end == ending else re.sub(r"[<\[][^<>\[\]]*$", "", end)


def _mark(turns: list[tuple[str, str]]) -> tuple[list, tuple]:
    """The texts as (turn, text), those of a thought apart, and turns with marks."""
    texts, marked = [], []
    for turn, (role, content) in enumerate(turns):
        is_thought = role == "assistant" and "</think>" in content
        parts = re.split(r"(\s*</?think>\s*)", content) if is_thought else [content]
        for i in range(0, len(parts), 2):
            if parts[i] or i == len(parts) - 1:
                texts.append((turn, parts[i]))
                parts[i] = _MARK.format(len(texts) - 1)
        marked.append((role, "".join(parts)))
    return texts, tuple(marked)


def _as_written(text: str, rendered: str, at: int, after: str) -> str:
    """The text as it stands at a place of the rendering, perhaps stripped."""
    core = text.strip()
    end = max(rendered.find(core, at), at) + len(core)
    while rendered[end : end + 1].isspace() and not rendered.startswith(after, end):
        end += 1
    if rendered[at:end].strip() != core or not rendered.startswith(after, end):
        raise _refusal(f"rewrites {text[:30]!r} or what is around it: change that")
    return rendered[at:end]
