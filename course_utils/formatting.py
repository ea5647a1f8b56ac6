"""From a record to tensors: token ids, labels, padding and packing.

`course_utils.templates` lays a record out; markers become special tokens, texts of the
record never do, whatever they look like.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from course_utils import templates
from course_utils.templates import TEMPLATES as TEMPLATES  # passed on to the lessons
from course_utils.templates import Conversation, Piece, Template, read_example
from course_utils.templates import with_examples as with_examples

if TYPE_CHECKING:
    import datasets
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORE = -100  # the label that torch's cross-entropy leaves out (its ignore_index)


def format_prompt(
    example: Mapping[str, Any],
    template: str | Template,
    *,
    system: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> str:
    """The text that stands before the (last) answer.

    `system` is for a record without system text of its own; None takes the template's
    default. The template "tokenizer" needs a tokenizer, and so do chats of several
    turns whose answers end with its end-of-sequence token.

    >>> format_prompt({"prompt": "Hello"}, "plain")
    'Human: Hello\\n\\nAssistant: '
    """
    asked = read_example(example, template, system).without_last_answer()
    pieces = templates.lay_out(asked, template, tokenizer)
    return "".join(piece.text for piece in pieces)


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
    A prompt and its answer are tokenized apart, as they are at inference. A record of
    more than `max_length` tokens loses its oldest exchanges until one is left; then
    that prompt's text is cut from its left, system text last. ValueError: an answer is
    missing or has no tokens, or the last one and the markers do not fit.
    """
    conversation = read_example(example, template, system)
    reader = _reader(tokenizer)
    if not all(exchange.answer for exchange in conversation.exchanges):
        raise ValueError("nothing to learn: an answer is missing or empty")
    ids, labels = _encode(conversation, template, reader)
    while max_length is not None and len(ids) > max_length:
        if len(conversation.exchanges) == 1:
            ids, labels = _cut_to(conversation, template, reader, max_length)
            break
        conversation = conversation._replace(exchanges=conversation.exchanges[1:])
        ids, labels = _encode(conversation, template, reader)
    return {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}


def tokenize_dataset(
    dataset: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | Template = "chatml",
    max_length: int | None = None,
) -> datasets.Dataset:
    """`tokenize_example` over a data set, in memory; errors begin with the row."""
    import datasets

    rows, reader = [], _reader(tokenizer)
    options = {"template": template, "max_length": max_length}
    for i, example in enumerate(dataset):
        try:
            rows.append(tokenize_example(example, reader, **options))
        except ValueError as error:
            raise ValueError(f"row {i}: {error}") from error
    return datasets.Dataset.from_list(rows)


def generation_prompt(
    user_text: str | Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str | Template = "chatml",
    system: str | None = None,
) -> list[int]:
    """Token ids to generate from: the part of `tokenize_example` before the answer.

    `user_text` is what the user says; or a record, whose last answer is left out.
    """
    example = {"prompt": user_text} if isinstance(user_text, str) else user_text
    asked = read_example(example, template, system).without_last_answer()
    return _encode(asked, template, _reader(tokenizer))[0]


def end_of_turn_ids(
    tokenizer: PreTrainedTokenizerBase, template: str | Template = "chatml"
) -> list[int]:
    """Ids at any of which generation stops: end of turn, end of sequence."""
    ids = [_end_of_turn_suffix(tokenizer, template)[0]]
    if tokenizer.eos_token_id not in (None, *ids):
        ids.append(tokenizer.eos_token_id)
    return ids


def _end_of_turn_suffix(tokenizer: Any, template: str | Template) -> list[int]:
    """The ids that end each answer in the labels, e.g. `<|im_end|>` and a newline."""
    conversation = read_example({"prompt": "?", "completion": "."}, template)
    reader = _reader(tokenizer)
    ids, labels = _encode(conversation, template, reader)
    ends = {token.id for token in reader.special.values()}
    for i in range(len(ids)):
        if labels[i] in ends:
            return ids[i:]
    raise ValueError("no special token ends an answer in this template")


def _cut_to(
    conversation: Conversation, template: str | Template, reader: _Reader, limit: int
) -> tuple[list[int], list[int]]:
    """Cut the fewest characters (found by halving) with which one exchange fits."""

    def cut(characters: int) -> tuple[list[int], list[int]]:
        return _encode(conversation.cut(characters), template, reader)

    (exchange,) = conversation.exchanges
    most = len(exchange.text + exchange.input + (conversation.system or ""))
    ids, labels = cut(most)
    if len(ids) > limit:
        learned = sum(label != IGNORE for label in labels)
        fault = f"the completion has {learned} tokens and the template's markers "
        fault += f"{len(ids) - learned}, more than max_length={limit}"
        raise ValueError(f"{fault}: raise max_length or shorten the completion")
    fewest = bisect_left(range(most), True, key=lambda n: len(cut(n)[0]) <= limit)
    return cut(fewest)


# --- batches: padding, and packing without a leak ---


@dataclass(eq=False)
class CompletionCollator:
    """Pads a list of examples to the longest of them and makes LongTensors (B, T).

    Padding is known by its position, never by its id: it has attention mask 0 and
    label -100, and an end-of-turn token keeps its label where pad = eos. Examples
    from `pack_examples` give `position_ids` in place of an attention mask; their
    padding is one more example, which the others do not see.
    """

    tokenizer: PreTrainedTokenizerBase  # pads with its pad token, else eos, else 0
    _: KW_ONLY
    pad_to_multiple_of: int | None = None  # T is rounded up to a multiple of this
    padding_side: str = "right"  # for training; "left" for generation

    def __post_init__(self) -> None:
        if (side := self.padding_side) not in ("left", "right"):
            raise ValueError(f"padding_side is 'left' or 'right', not {side!r}")

    def __call__(
        self, examples: Sequence[Mapping[str, Sequence[int]]]
    ) -> dict[str, torch.Tensor]:
        import torch

        length = max(len(example["input_ids"]) for example in examples)
        length += -length % (self.pad_to_multiple_of or 1)
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        pad = next(token for token in candidates if token is not None)
        paddings = {"input_ids": [pad] * length, "labels": [IGNORE] * length}
        if "position_ids" in examples[0]:
            paddings["position_ids"] = range(length)
        else:
            paddings["attention_mask"] = [0] * length
        rows = defaultdict(list)
        for example in examples:
            example = {"attention_mask": [1] * len(example["input_ids"]), **example}
            for name, padding in paddings.items():
                values = list(example[name])
                extra = list(padding[: length - len(values)])
                is_right = self.padding_side == "right"
                rows[name].append(values + extra if is_right else extra + values)
        return {name: torch.tensor(values) for name, values in rows.items()}


def pack_examples(
    examples: Iterable[Mapping[str, Sequence[int]]], max_length: int
) -> list[dict[str, list[int]]]:
    """Put whole examples side by side in rows of at most `max_length` tokens.

    First-fit decreasing: longest first, each into the first row with room. Positions
    begin again at 0 with each example, by which transformers keeps examples from seeing
    each other: pass `position_ids` and no attention mask, in training or with
    `use_cache=False`. What sees the model (`completion_loss`, `prepare_trainer`) asks
    whether it does. The first label of each example is -100, as it would be predicted
    from the one before. ValueError: an example is empty or longer than `max_length`.

    >>> short, long = [[{"input_ids": x, "labels": x}] for x in ([7, 8], [4, 5, 6])]
    >>> pack_examples(short + long, 8)[0]["position_ids"]
    [0, 1, 2, 0, 1]
    """
    examples = list(examples)
    for i, example in enumerate(examples):
        if not 0 < (length := len(example["input_ids"])) <= max_length:
            cure = f"give each 1 to {max_length} (max_length), or raise it"
            raise ValueError(f"example {i} has {length} tokens: {cure}")
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


# --- token ids ---


class _Special(NamedTuple):
    """A token that the tokenizer cuts out of a text before it splits the rest."""

    id: int
    lstrip: bool = False
    rstrip: bool = False


class _Run(NamedTuple):
    part: int | str  # a special token's id, or text to tokenize
    learned: bool
    literal: bool  # holds words of the record


@dataclass(frozen=True)
class _Reader:
    """A tokenizer as it stands, and what is known of it."""

    tokenizer: Any
    special: dict[str, _Special]  # tokens beside the vocabulary, by their text
    pattern: re.Pattern  # any of them
    forbidden: set[int]  # as which no text of a record may be read: it forges a turn
    harmless: set[int]  # blank lines, as Gemma's, and the token for the unknown
    within_text: Any  # the tokenizer without a space of its own before a text
    first_only: bool  # it puts that space at the very start, not after special tokens
    marker_ids: dict[tuple[bool, str], list[int]]  # found so far; True: within_text's


def _reader(tokenizer: Any) -> _Reader:
    """The reader of a tokenizer, made anew where it was changed."""
    if isinstance(tokenizer, _Reader):  # asked for once, for many records
        return tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    steps = backend and repr((backend.normalizer, backend.pre_tokenizer))
    ids = zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
    added = tuple(tokenizer.added_tokens_decoder.items())
    return _make_reader(tokenizer, (backend, steps), tuple(ids), added)


@lru_cache(maxsize=8)
def _make_reader(tokenizer: Any, _steps: tuple, ids: tuple, added: tuple) -> _Reader:
    tokens = {text: _Special(i) for text, i in ids}
    tokens |= {t.content: _Special(i, t.lstrip, t.rstrip) for i, t in added}
    names = sorted(tokens, key=len, reverse=True)
    pattern = re.compile("(" + "|".join(map(re.escape, names)) + ")")
    special = {i for _, i in ids} | {i for i, t in added if t.special}
    blank = {token.id for name, token in tokens.items() if not name.strip()} - special
    blank.add(tokenizer.unk_token_id)
    within = _within_text(tokenizer)
    return _Reader(tokenizer, tokens, pattern, special - blank, blank, *within, {})


def _encode(
    conversation: Conversation, template: str | Template, reader: _Reader
) -> tuple[list[int], list[int]]:
    """Token ids and labels of a conversation."""
    tokenizer, special = reader.tokenizer, reader.special
    layout = templates.find_template(template)
    pieces = templates.lay_out(conversation, layout, tokenizer)
    has_markers = "<|im_start|>" in special and "<|im_end|>" in special
    if not has_markers and "<|im_end|>" in (layout.end or ""):
        own = "'tokenizer' (its own), " * bool(tokenizer.chat_template)
        cure = f"use template={own}'alpaca' or 'plain'"
        raise ValueError(f"this tokenizer has no <|im_start|> and <|im_end|>: {cure}")
    runs = _runs(pieces, reader)
    own_start = layout.end or layout.name == "tokenizer"
    bos = None if own_start else templates.leading_bos(tokenizer)
    ids: list[int] = [special[bos].id] if bos else []
    labels = [IGNORE] * len(ids)
    for run, new in zip(runs, _ids_of(runs, reader), strict=True):
        if run.literal and run.learned and not new:
            raise ValueError(f"nothing to learn: no token stands for {run.part!r}")
        ids += new
        labels += new if run.learned else [IGNORE] * len(new)
    return ids, labels


def _runs(pieces: list[Piece], reader: _Reader) -> list[_Run]:
    """Join neighbouring texts, so that they are tokenized as in the whole rendering."""
    runs: list[_Run] = []
    strip = False  # a special token may swallow the white space that follows it
    for piece in pieces:
        text, literal = piece.text, piece.literal
        for part in [text] if literal else reader.pattern.split(text):
            token = None if literal else reader.special.get(part)
            part = part.lstrip() if strip else part
            last = runs[-1] if runs and isinstance(runs[-1].part, str) else None
            if token:
                if last and token.lstrip:
                    runs[-1] = last._replace(part=last.part.rstrip())
                runs.append(_Run(token.id, piece.learned, False))
                strip = token.rstrip
            elif part and last and last.learned == piece.learned:
                runs[-1] = _Run(last.part + part, last.learned, last.literal or literal)
            elif part:
                runs.append(_Run(part, piece.learned, literal))
                strip = False
    return runs


def _ids_of(runs: list[_Run], reader: _Reader) -> list[list[int]]:
    """The ids of each run; the record's texts are tokenized together."""
    # A prompt is read alike with its answer and without: by no marker of an answer's.
    markers = [run for run in runs if isinstance(run.part, int)]
    asked = {run.part for run in markers if not run.learned} - reader.harmless
    told = {run.part for run in markers if run.learned} - reader.harmless
    forbidden = [reader.forbidden | asked, reader.forbidden | asked | told]
    ids: dict[int, list[int]] = {}
    texts = defaultdict(list)  # by tokenizer: the places of runs with words
    for i, run in enumerate(runs):
        after_token = i > 0 and isinstance(runs[i - 1].part, int)
        is_within = i > 0 and (reader.first_only or not after_token)
        tokenizer = reader.within_text if is_within else reader.tokenizer
        marker = is_within, run.part
        if isinstance(run.part, int):
            ids[i] = [run.part]
        elif run.literal:
            texts[tokenizer].append(i)
        elif marker in reader.marker_ids:
            ids[i] = reader.marker_ids[marker]
        else:
            ids[i] = reader.marker_ids[marker] = _plain_ids([run.part], tokenizer)[0]
    for tokenizer, places in texts.items():
        encoded = _plain_ids([runs[i].part for i in places], tokenizer)
        for i, new in zip(places, encoded, strict=True):
            text, barred = runs[i].part, forbidden[runs[i].learned]
            ids[i] = _break_look_alikes(text, new, tokenizer, reader, barred)
    return [ids[i] for i in range(len(runs))]


def _plain_ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    options = {"add_special_tokens": False, "split_special_tokens": True}
    return tokenizer(texts, verbose=False, **options)["input_ids"]


def _break_look_alikes(
    text: str, ids: list[int], tokenizer: Any, reader: _Reader, forbidden: set[int]
) -> list[int]:
    """Ids with look-alikes of markers cut after their first character, if any."""
    done: list[int] = []
    while not forbidden.isdisjoint(ids):
        places = [
            text.find(name) + 1
            for name, token in reader.special.items()
            if token.id in forbidden and token.id in ids and len(name) > 1
        ]
        end = min((place for place in places if place), default=0)
        if not end:
            break
        done += _plain_ids([text[:end]], tokenizer)[0]  # no look-alike before it
        tokenizer, text = reader.within_text, text[end:]
        ids = _plain_ids([text], tokenizer)[0]
    return done + ids


def _within_text(tokenizer: Any) -> tuple[Any, bool]:
    """The tokenizer without the space that it puts before a text's first word.

    Second: whether it puts that space at the very start only, else also after each
    special token. A tokenizer that puts none is returned as it is.
    """
    from tokenizers import normalizers
    from tokenizers.pre_tokenizers import ByteLevel, Metaspace

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not backend:  # a tokenizer in Python
        if "".join(tokenizer.tokenize("a")).startswith("▁"):
            raise ValueError("a slow tokenizer: load it with a tokenizer.json")
        return tokenizer, False
    split, normalizer = backend.pre_tokenizer, backend.normalizer
    steps = list(normalizer) if isinstance(normalizer, normalizers.Sequence) else []
    metaspace = isinstance(split, Metaspace) and split.prepend_scheme != "never"
    byte_level = isinstance(split, ByteLevel) and split.add_prefix_space
    # Older SentencePiece conversions do it by normalizers.
    older = [*map(type, steps)] == [normalizers.Prepend, normalizers.Replace]
    if not (metaspace or byte_level or older):
        return tokenizer, False
    other = copy.deepcopy(tokenizer)
    if metaspace:
        other.backend_tokenizer.pre_tokenizer.prepend_scheme = "never"
    elif byte_level:
        other.backend_tokenizer.pre_tokenizer.add_prefix_space = False
    else:
        other.backend_tokenizer.normalizer = steps[1]
    return other, metaspace and split.prepend_scheme == "first"
