"""Prompt templates, and the records that fill them.

A template decides what stands around the user's words. Here are the templates and the
one shape that every record is read into; `course_utils.layout` brings them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
    # Whatever chat template the tokenizer carries: see course_utils.layout.
    "tokenizer": Template("tokenizer"),
}


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

    def without_last_answer(self) -> Conversation:
        """The same conversation, its last answer still to be given."""
        *earlier, last = self.exchanges
        return replace(self, exchanges=(*earlier, replace(last, answer=None)))

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


def with_examples(
    template: str | Template, examples: Sequence[Mapping[str, str]], *, system: str
) -> Template:
    """A template whose every conversation begins with worked examples.

    This is few-shot prompting: the model sees each example as an earlier turn of the
    same chat, the question from the user and the answer as its own.

    Args:
        template: the layout to begin with; it needs an end of turn of its own.
        examples: records with `prompt` and `completion`, in the order shown. They are
            yours: text in them that looks like a marker becomes one.
        system: the instructions that stand above everything, where a conversation has
            no system text of its own.

    Raises:
        ValueError: the template ends its answers with the tokenizer's token.

    >>> shots = [{"prompt": "2 + 2?", "completion": "4"}]
    >>> with_examples("chatml", shots, system="Count.").default_system[-23:]
    '>assistant\\n4<|im_end|>\\n'
    """
    layout = find_template(template)
    if not layout.end:
        raise ValueError(f"the {layout.name} template has no end of turn of its own")
    shots = ""
    for example in examples:
        turn = layout.turn.replace("{system}", "").replace("{input}", "")
        shots += turn.replace("{text}", example["prompt"])
        shots += example["completion"] + layout.end
    name = f"{layout.name} with {len(examples)} examples"
    opening = layout.system.replace("{text}", system) + shots
    with_own = layout.system + shots  # other system text stands above the same examples
    return replace(layout, name=name, system=with_own, default_system=opening)


def read_example(
    example: Mapping[str, Any], template: Template, system: str | None = None
) -> Conversation:
    """Read prompt + completion, instruction + input + output, or messages.

    The record's own system turn comes before `system`. A `prompt` and a `completion`
    that are texts are the record, whatever else stands beside them.

    Raises:
        ValueError: the record has none of these, a value is not text, or its turns do
            not alternate user, assistant, user, ...
    """
    prompt, completion = example.get("prompt"), example.get("completion")
    messages = example.get("messages")
    if isinstance(prompt, list):  # the conversational form of TRL
        messages = prompt + (completion if isinstance(completion, list) else [])
    pair = isinstance(prompt, str) and isinstance(completion, str)
    if messages is not None and not pair:
        return _read_messages(messages, system)
    text, extra, answer = prompt, "", completion
    asked, given = example.get("instruction"), example.get("input") or ""
    parted = template.input is not None and asked
    if text is None or (parted and text in (asked, f"{asked}\n\n{given}")):
        text, extra = asked, given
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
