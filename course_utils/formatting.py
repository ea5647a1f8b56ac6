"""From a record to tensors: token ids, labels, padding and packing.

A record is laid out by a template (`course_utils.templates`), its markers become
special tokens, its texts become ordinary tokens only, and labels are -100 on every
token that is not learned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from course_utils.batching import CompletionCollator, pack_examples
from course_utils.encoding import IGNORE, encode, special_tokens
from course_utils.layout import lay_out
from course_utils.templates import (
    TEMPLATES,
    Conversation,
    Template,
    find_template,
    read_example,
    with_examples,
)

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORE",
    "TEMPLATES",
    "CompletionCollator",
    "Template",
    "end_of_turn_ids",
    "end_of_turn_suffix",
    "format_prompt",
    "generation_prompt",
    "pack_examples",
    "token_rows",
    "tokenize_dataset",
    "tokenize_example",
    "with_examples",
]


def format_prompt(
    example: Mapping[str, Any],
    template: str | Template,
    *,
    system: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> str:
    """The text that stands before the (last) answer.

    Args:
        example: a record with prompt, with instruction and input, or with messages.
        template: a name in `TEMPLATES`.
        system: system text for a record that has none of its own; None takes the
            template's default.
        tokenizer: needed by the template "tokenizer", and by chats of several turns
            whose answers end with the tokenizer's end-of-sequence token.

    Raises:
        ValueError: unknown template, or a record that it cannot lay out.

    >>> format_prompt({"prompt": "Hello"}, "plain")
    'Human: Hello\\n\\nAssistant: '
    """
    layout = find_template(template)
    conversation = read_example(example, layout, system).without_last_answer()
    return "".join(piece.text for piece in lay_out(conversation, layout, tokenizer))


def tokenize_example(
    example: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | Template = "chatml",
    max_length: int | None = None,
    system: str | None = None,
) -> dict[str, list[int]]:
    """Token ids, labels and mask of one record; three lists of the same length T.

    Every answer and its end-of-turn token are learned; all other labels are -100.
    A prompt and its answer are tokenized apart, as they are at inference.

    A record longer than `max_length` tokens loses its oldest exchanges (a user turn and
    its answer) until one is left; then the text of that prompt is cut from its left,
    system text last. Markers and the template's default system turn are kept.

    Args:
        example: prompt and completion, instruction and output, or messages.
        tokenizer: of the model that will learn from it.
        template: a name in `TEMPLATES`.
        max_length: the most tokens of one record; None means no limit.
        system: system text for a record that has none of its own.

    Raises:
        ValueError: there is no answer, one has no tokens, or the last answer does not
            fit into `max_length` beside the template's markers.
    """
    layout = find_template(template)
    conversation = read_example(example, layout, system)
    for exchange in conversation.exchanges:
        if not exchange.answer:
            raise ValueError("nothing to learn: an answer is missing or empty")
    ids, labels = encode(lay_out(conversation, layout, tokenizer), layout, tokenizer)
    while max_length is not None and len(ids) > max_length:
        if len(conversation.exchanges) == 1:
            ids, labels = _cut_to(conversation, layout, tokenizer, max_length)
            break
        later = conversation.exchanges[1:]
        conversation = Conversation(conversation.system, later)
        pieces = lay_out(conversation, layout, tokenizer)
        ids, labels = encode(pieces, layout, tokenizer)
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}


def generation_prompt(
    user_text: str | Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | Template = "chatml",
    system: str | None = None,
) -> list[int]:
    """Token ids to generate from: the part of `tokenize_example` before the answer.

    Args:
        user_text: what the user says, as it is; or a record, whose last answer is
            left out.
        tokenizer: of the model that will answer.
        template: a name in `TEMPLATES`.
        system: system text; None takes the template's default.
    """
    layout = find_template(template)
    example = {"prompt": user_text} if isinstance(user_text, str) else user_text
    conversation = read_example(example, layout, system).without_last_answer()
    return encode(lay_out(conversation, layout, tokenizer), layout, tokenizer)[0]


def end_of_turn_suffix(
    tokenizer: PreTrainedTokenizerBase, template: str | Template = "chatml"
) -> list[int]:
    """The ids that end each answer in the labels, e.g. `<|im_end|>` and a newline.

    Args:
        tokenizer: of the model.
        template: a name in `TEMPLATES`.

    Raises:
        ValueError: no special token ends an answer in this template.
    """
    layout = find_template(template)
    conversation = read_example({"prompt": "?", "completion": "."}, layout)
    pieces = lay_out(conversation, layout, tokenizer)
    ids, labels = encode(pieces, layout, tokenizer)
    start = next(i for i, label in enumerate(labels) if label != IGNORE)
    special, _ = special_tokens(tokenizer, len(tokenizer))
    ends = {token.id for token in special.values()}
    first = next((i for i in range(start, len(ids)) if ids[i] in ends), None)
    if first is None:
        raise ValueError("no special token ends an answer in this template")
    return ids[first:]


def end_of_turn_ids(
    tokenizer: PreTrainedTokenizerBase, template: str | Template = "chatml"
) -> list[int]:
    """Ids at any of which generation stops: end of turn, end of sequence.

    Args:
        tokenizer: of the model.
        template: a name in `TEMPLATES`.
    """
    ids = [end_of_turn_suffix(tokenizer, template)[0]]
    if tokenizer.eos_token_id not in (None, *ids):
        ids.append(tokenizer.eos_token_id)
    return ids


def token_rows(
    features: Mapping[str, Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """One row a token: position, id, token (as in the vocabulary), text, learned.

    Args:
        features: `input_ids` and `labels` of one record, each of length T.
        tokenizer: the one that made them.
    """
    ids, labels = list(features["input_ids"]), list(features["labels"])
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return [
        {
            "position": i,
            "id": ids[i],
            "token": tokens[i],
            "text": tokenizer.decode([ids[i]]),
            "label": labels[i],
            "learned": labels[i] != IGNORE,
        }
        for i in range(len(ids))
    ]


def tokenize_dataset(
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | Template = "chatml",
    max_length: int | None = None,
    system: str | None = None,
) -> datasets.Dataset:
    """`tokenize_example` over a data set; the result is kept in memory.

    Args:
        dataset: records, as a `datasets.Dataset` or any iterable.
        tokenizer: of the model that will learn from them.
        template: a name in `TEMPLATES`.
        max_length: the most tokens of one record; None means no limit.
        system: system text for records that have none of their own.

    Raises:
        ValueError: a record cannot be used; the message begins with its row, from 0.
    """
    import datasets

    options = {"template": template, "max_length": max_length, "system": system}
    columns: dict[str, list] = {"input_ids": [], "labels": [], "attention_mask": []}
    for row, example in enumerate(dataset):
        try:
            features = tokenize_example(example, tokenizer, **options)
        except ValueError as error:
            raise ValueError(f"row {row}: {error}") from error
        for name, values in features.items():
            columns[name].append(values)
    return datasets.Dataset.from_dict(columns)


def _cut_to(
    conversation: Conversation, layout: Template, tokenizer: Any, max_length: int
) -> tuple[list[int], list[int]]:
    """Cut the fewest characters (found by halving) with which one exchange fits."""

    def attempt(characters: int) -> tuple[list[int], list[int]]:
        pieces = lay_out(conversation.cut(characters), layout, tokenizer)
        return encode(pieces, layout, tokenizer)

    too_few, enough = 0, conversation.prompt_characters
    best = attempt(enough)
    if len(best[0]) > max_length:
        learned = sum(label != IGNORE for label in best[1])
        raise ValueError(
            f"the completion has {learned} tokens with its end of turn and the "
            f"template's markers {len(best[0]) - learned}, together more than "
            f"max_length={max_length}: raise max_length or shorten the completion"
        )
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        trial = attempt(middle)
        if len(trial[0]) > max_length:
            too_few = middle
        else:
            enough, best = middle, trial
    return best
