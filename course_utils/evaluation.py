"""Measure a model on a data set: exact match, field F1, perplexity, forgetting."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from course_utils import scoring
from course_utils.formatting import IGNORE, tokenize_example
from course_utils.inference import decodes, generate, inference_state, last_logits
from course_utils.scoring import exact_match, field_f1
from course_utils.templates import Template

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Qwen3's own template has it before each answer, so a model tuned by it writes it.
_EMPTY_THOUGHT = re.compile(r"\A\s*<think>\s*</think>\s*")


@dataclass(frozen=True)
class Evaluation:
    """Answers of a model to a data set, in its order, and their scores."""

    exact_match: float  # share of answers equal to the reference, 0 to 1
    field_f1: float  # micro F1 over the fields of JSON objects, 0 to 1; NaN of text
    predictions: tuple[str, ...]
    references: tuple[str, ...]
    prompts: tuple[str, ...]
    slices: tuple[str, ...] | None  # None where the data has none
    seconds: float  # wall time of the generation
    as_text: bool = False  # the answers are compared as text, not as JSON

    def by_slice(self) -> dict[str, float]:
        """Exact match of each slice, 0 to 1; empty where the data has no slices."""
        if self.slices is None:
            return {}
        score = scoring.exact_text if self.as_text else exact_match
        return scoring.by_slice(self.predictions, self.references, self.slices, score)

    def __str__(self) -> str:
        count, slices = len(self.references), self.by_slice()
        error = scoring.standard_error(self.exact_match, count)
        text = f"exact match {self.exact_match:.1%} ± {100 * error:.1f} of {count} · "
        if not self.as_text:
            kinds = scoring.by_kind(self.predictions, self.references)
            text += "".join(f"{name} {share:.1%} · " for name, share in kinds.items())
            text += f"field F1 {self.field_f1:.3f} · "
        text += f"{self.seconds:.1f} s"
        if len(slices) > 1:
            width = max(map(len, slices))
            for name, share in slices.items():
                count = self.slices.count(name)
                text += f"\n  {name:<{width}}  {share:6.1%} of {count}"
        return text


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Mapping[str, Any]],
    *,
    template: str | Template | None = "chatml",
    system: str | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    as_text: bool = False,
) -> Evaluation:
    """Generate an answer to each prompt, and score it against the completion.

    Records have a ``prompt``, a ``completion`` (one JSON object, unless ``as_text``)
    and perhaps a ``slice``; ValueError where one lacks any, or there are none.

    Args:
        limit: score that many records only, chosen by ``stratified``.
        max_new_tokens: None takes 8 more than the longest completion has tokens. A
            right answer that is spread over lines and indented needs more.
    """
    records = stratified(dataset, limit)
    prompts, references = _column(records, "prompt"), _column(records, "completion")
    slices = _column(records, "slice") if "slice" in records[0] else None
    if not as_text:
        exact_match(references, references)  # a broken reference is said now
    if max_new_tokens is None:
        encoded = tokenizer(list(references), add_special_tokens=False)["input_ids"]
        max_new_tokens = max(map(len, encoded)) + 8
    start = time.perf_counter()
    options = {"template": template, "system": system, "batch_size": batch_size}
    options |= {"max_new_tokens": max_new_tokens}
    asked = prompts if template is None else records
    predictions = generate(model, tokenizer, asked, **options)
    seconds = time.perf_counter() - start
    predictions = tuple(_EMPTY_THOUGHT.sub("", text) for text in predictions)
    answers = predictions, references
    if as_text:
        scores = scoring.exact_text(*answers), math.nan
    else:
        scores = exact_match(*answers), field_f1(*answers)
    return Evaluation(*scores, *answers, prompts, slices, seconds, as_text)


def free_text(references: Iterable[str]) -> bool:
    """Whether none of `references` is a JSON object: compare such answers as text.

    >>> free_text(["yes", "no"]), free_text(["yes", "{}"])
    (True, False)
    """
    return all(scoring.parse_json_object(text) is None for text in references)


def stratified(
    dataset: Iterable[Mapping[str, Any]], limit: int | None = None
) -> list[Mapping[str, Any]]:
    """Take `limit` records (None: all), the same ones every time, spread evenly.

    Each slice has its share, by largest remainder, and at least one if `limit` allows.

    >>> rows = [{"n": i, "slice": "hard" if i % 4 == 0 else "easy"} for i in range(12)]
    >>> [row["n"] for row in stratified(rows, 4)]
    [2, 4, 6, 10]
    """
    records = list(dataset)
    if not records:
        raise ValueError("the data set is empty")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be 1 or more, not {limit}")
    if limit is None or limit >= len(records):
        return records
    groups: dict[Any, list[int]] = {}
    for i, record in enumerate(records):
        groups.setdefault(record.get("slice"), []).append(i)
    least = 1 if limit >= len(groups) else 0
    exact = {name: limit * len(g) / len(records) for name, g in groups.items()}
    places = {name: max(least, int(share)) for name, share in exact.items()}
    while spare := limit - sum(places.values()):
        step = 1 if spare > 0 else -1
        able = [n for n in groups if places[n] + step >= least]
        name = max(able, key=lambda n: step * (exact[n] - places[n]))
        places[name] += step
    chosen = []
    for name, group in groups.items():
        k = places[name]
        chosen += [group[(2 * i + 1) * len(group) // (2 * k)] for i in range(k)]
    return [records[i] for i in sorted(chosen)]


def _column(records: Sequence[Mapping[str, Any]], name: str) -> tuple[str, ...]:
    """The strings of one column; a ValueError names a record that has none."""
    for i, record in enumerate(records):
        if not isinstance(record.get(name), str):
            found = type(record.get(name)).__name__
            raise ValueError(f"record {i}: {name!r} must be a string, found {found}")
    return tuple(record[name] for record in records)


@dataclass(frozen=True)
class Perplexity:
    """How surprised a model is by the right answers."""

    loss: float  # mean negative log-likelihood of a completion token, in nats
    perplexity: float  # exp(loss)
    tokens: int  # completion tokens, ends of turn included

    def __str__(self) -> str:
        text = f"loss {self.loss:.4f} nats a token · perplexity {self.perplexity:.3f}"
        return f"{text} · {self.tokens} tokens"


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Mapping[str, Any]],
    *,
    template: str | Template = "chatml",
    limit: int | None = None,
    batch_size: int = 16,
) -> Perplexity:
    """Perplexity of the completions, each given its prompt.

    PPL = exp(-(1/N) Σ log p(token | all tokens before it)), summed over the N tokens
    of all completions, their end of turn included: the tokens that training learns.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence

    records = stratified(dataset, limit)
    rows = [tokenize_example(row, tokenizer, template=template) for row in records]
    rows.sort(key=lambda row: len(row["input_ids"]))
    if not decodes(model):
        batch_size = 1  # no padding, so nothing that such a model could mistake
    total, tokens = 0.0, 0
    with torch.no_grad(), inference_state(model):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            columns = [row["labels"] for row in batch]
            first = [[x != IGNORE for x in labels].index(True) for labels in columns]
            keep = max(len(x) - i for x, i in zip(columns, first, strict=True)) + 1
            ends = [torch.tensor(labels[-keep:]) for labels in columns]
            labels = pad_sequence(ends, True, IGNORE, padding_side="left")
            ids = [row["input_ids"] for row in batch]
            logits = last_logits(model, ids, keep, share_at_most=min(first) - 1)
            labels = labels[:, 1 - logits.shape[1] :].to(logits.device)
            learned = labels != IGNORE
            chosen = logits[:, :-1][learned].float()
            total += cross_entropy(chosen, labels[learned], reduction="sum").item()
            tokens += int(learned.sum())
    loss = total / tokens
    return Perplexity(loss, math.exp(loss), tokens)


@dataclass(frozen=True)
class AnswerShare:
    """General questions, in their order: how many answers contain the expected one."""

    share: float  # 0 to 1
    correct: tuple[bool, ...]
    answers: tuple[str, ...]
    prompts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{sum(self.correct)} of {len(self.correct)} answers ({self.share:.1%})"


def _contains_answer(text: str, expected: Sequence[str]) -> bool:
    """Whether an expected answer stands in `text` as whole words, in any case."""
    words = "|".join(re.escape(answer.strip()) for answer in expected)
    return bool(re.search(rf"(?<!\w)(?:{words})(?!\w)", text, re.IGNORECASE))


def answer_share(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Mapping[str, Any]],
    *,
    limit: int | None = None,
    max_new_tokens: int = 32,
    **options: Any,
) -> AnswerShare:
    """Ask general questions; count the answers that contain the expected one.

    Each record has a ``prompt`` and ``answers``, strings that each count as right, or
    ``answer``, one string; a record without one raises ValueError.
    """
    records = stratified(dataset, limit)
    prompts = _column(records, "prompt")
    expected = [_expected(i, record) for i, record in enumerate(records)]
    options["max_new_tokens"] = max_new_tokens
    answers = generate(model, tokenizer, prompts, **options)
    correct = tuple(map(_contains_answer, answers, expected))
    return AnswerShare(sum(correct) / len(correct), correct, tuple(answers), prompts)


def _expected(i: int, record: Mapping[str, Any]) -> list[str]:
    answers = record.get("answers") or record.get("answer")
    texts = [answers] if isinstance(answers, str) else answers or ()
    if not (texts := [text for text in texts if text.strip()]):  # a blank fits anywhere
        lacks = "no 'answers' (a list of texts) and no 'answer' (a text)"
        raise ValueError(f"record {i} has {lacks}; its fields are {sorted(record)}")
    return texts


@dataclass(frozen=True)
class Forgetting:
    """What a model lost on general questions while it learned something else."""

    loss_change: float  # after minus before, nats a token: above 0 where it forgot
    share_change: float  # of right answers, after minus before
    lost: tuple[str, ...]  # the questions answered right before and wrong after

    def __str__(self) -> str:
        text = f"completion loss {self.loss_change:+.3f} nats · right answers "
        return text + f"{100 * self.share_change:+.1f} points · {len(self.lost)} lost"


def forgetting(
    before: tuple[Perplexity, AnswerShare], after: tuple[Perplexity, AnswerShare]
) -> Forgetting:
    """Compare ``perplexity`` and ``answer_share`` before and after a fine-tuning."""
    (loss0, share0), (loss1, share1) = before, after
    if share0.prompts != share1.prompts or loss0.tokens != loss1.tokens:
        raise ValueError("before and after were not measured on the same questions")
    pairs = zip(share0.prompts, share0.correct, share1.correct, strict=True)
    lost = tuple(prompt for prompt, was, still in pairs if was and not still)
    return Forgetting(loss1.loss - loss0.loss, share1.share - share0.share, lost)
