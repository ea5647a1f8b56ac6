"""From a record to tensors: token ids, labels, padding and packing.

A record is laid out by a template (`course_utils.templates`), its markers become
special tokens, its texts become ordinary tokens only, and labels are -100 on every
token that is not learned.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from course_utils.templates import (
    TEMPLATES,
    Conversation,
    Piece,
    Template,
    find_template,
    lay_out,
    leading_bos,
    read_example,
    with_examples,
)

if TYPE_CHECKING:
    import datasets
    import torch
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "CompletionCollator",
    "IGNORE",
    "TEMPLATES",
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

# --- encoding ---
# Pieces of text become token ids and labels.
#
# Markers may hold special tokens; the texts of a record never do, whatever they look
# like.

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


# --- batching ---
# Examples become batches: dynamic padding, and packing without a leak.


class CompletionCollator:
    """Pads a list of examples to the longest of them and makes LongTensors (B, T).

    Padding is known by its position, never by its id: it has attention mask 0 and
    label -100, and an end-of-turn token keeps its label where pad = eos. Examples
    from `pack_examples` give `position_ids` in place of an attention mask; their
    padding is a document of its own, which nothing else attends to.

    Attributes:
        tokenizer: gives the id to pad with (its pad token, else eos, else 0).
        pad_to_multiple_of: round T up to a multiple of this.
        padding_side: "right" for training, "left" for generation.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pad_to_multiple_of: int | None = None,
        padding_side: str = "right",
    ) -> None:
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is 'left' or 'right', not {padding_side!r}")
        self.tokenizer = tokenizer
        self.pad_to_multiple_of = pad_to_multiple_of
        self.padding_side = padding_side

    def __call__(
        self, examples: Sequence[Mapping[str, Sequence[int]]]
    ) -> dict[str, torch.Tensor]:
        import torch

        length = max(len(example["input_ids"]) for example in examples)
        multiple = self.pad_to_multiple_of or 1
        length = -(-length // multiple) * multiple
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        pad = next(token for token in candidates if token is not None)
        packed = "position_ids" in examples[0]
        rows: dict[str, list] = {"input_ids": [], "labels": []}
        rows["position_ids" if packed else "attention_mask"] = []
        for example in examples:
            ids = list(example["input_ids"])
            extra = length - len(ids)
            filling = {
                "input_ids": (ids, [pad] * extra),
                "labels": (list(example["labels"]), [IGNORE] * extra),
            }
            if packed:
                positions = list(example["position_ids"])
                filling["position_ids"] = (positions, list(range(extra)))
            else:
                mask = list(example.get("attention_mask", [1] * len(ids)))
                filling["attention_mask"] = (mask, [0] * extra)
            for name, (values, padding) in filling.items():
                right = self.padding_side == "right"
                rows[name].append(values + padding if right else padding + values)
        return {name: torch.tensor(values) for name, values in rows.items()}


def pack_examples(
    examples: Iterable[Mapping[str, Sequence[int]]], max_length: int
) -> list[dict[str, list[int]]]:
    """Put whole examples side by side in rows of at most `max_length` tokens.

    First-fit decreasing: longest first (ties in the given order), each into the first
    row with room. Positions begin again at 0 with each example, by which transformers
    keeps examples from seeing each other: pass `position_ids` and no attention mask,
    in training or with `use_cache=False`. The first label of each example is -100, as
    it would be predicted from the example before.

    Raises:
        ValueError: an example is empty or longer than `max_length`.

    >>> short, long = [[{"input_ids": x, "labels": x}] for x in ([7, 8], [4, 5, 6])]
    >>> pack_examples(short + long, 8)[0]["position_ids"]
    [0, 1, 2, 0, 1]
    """
    examples = list(examples)
    for i, example in enumerate(examples):
        length = len(example["input_ids"])
        if not 0 < length <= max_length:
            raise ValueError(
                f"example {i} has {length} tokens: give each 1 to {max_length} "
                "(tokenize with that max_length, or raise it)"
            )
    rows: list[dict[str, list[int]]] = []
    for example in sorted(examples, key=lambda e: -len(e["input_ids"])):
        ids, labels = list(example["input_ids"]), list(example["labels"])
        room = max_length - len(ids)
        row = next((row for row in rows if len(row["input_ids"]) <= room), None)
        if row is None:
            row = {"input_ids": [], "labels": [], "position_ids": []}
            rows.append(row)
        row["input_ids"] += ids
        row["labels"] += [IGNORE, *labels[1:]]
        row["position_ids"] += range(len(ids))
    return rows


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
