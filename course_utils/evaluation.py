"""Measure a model on a data set: exact match, field F1, perplexity, forgetting.

The scores themselves live in ``course_utils.scoring`` (strings in, a number out) and
are offered here too; this module adds the model.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from course_utils import scoring
from course_utils.forgetting import AnswerShare, Forgetting, answer_share, forgetting
from course_utils.formatting import find_template
from course_utils.inference import generate
from course_utils.likelihood import Perplexity, perplexity
from course_utils.scoring import exact_match, field_f1
from course_utils.selection import column, stratified

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from course_utils.formatting import Template

__all__ = [
    "AnswerShare",
    "Evaluation",
    "Forgetting",
    "Perplexity",
    "answer_share",
    "evaluate",
    "exact_match",
    "field_f1",
    "forgetting",
    "free_text",
    "perplexity",
    "stratified",
]


_EMPTY_THOUGHT = re.compile(r"\A\s*<think>\s*</think>\s*")


@dataclass(frozen=True)
class Evaluation:
    """Answers of a model to a data set, and their scores.

    Attributes:
        exact_match: share of answers equal to the reference, 0 to 1: as JSON, or as
            text where `as_text`.
        field_f1: micro F1 over the fields of the JSON objects, 0 to 1; NaN where
            `as_text`.
        predictions, references, prompts: strings, in the order of the data.
        slices: the slice of each example, or None where the data has none.
        seconds: wall seconds of the generation.
        as_text: the answers are free text, not JSON.
    """

    exact_match: float
    field_f1: float
    predictions: tuple[str, ...]
    references: tuple[str, ...]
    prompts: tuple[str, ...]
    slices: tuple[str, ...] | None
    seconds: float
    as_text: bool = False

    def by_slice(self) -> dict[str, float]:
        """Exact match of each slice, 0 to 1; empty where the data has no slices."""
        if self.slices is None:
            return {}
        score = scoring.exact_text if self.as_text else exact_match
        return scoring.by_slice(self.predictions, self.references, self.slices, score)

    def mistakes(self) -> list[tuple[str, str, str]]:
        """(prompt, prediction, reference) of each answer that is not an exact match."""
        score = scoring.exact_text if self.as_text else exact_match
        rows = zip(self.prompts, self.predictions, self.references, strict=True)
        return [(p, a, r) for p, a, r in rows if not score([a], [r])]

    def __str__(self) -> str:
        n = len(self.references)
        head = f"exact match {self.exact_match:.1%} of {n} · "
        head += "" if self.as_text else f"field F1 {self.field_f1:.3f} · "
        head += f"{self.seconds:.1f} s"
        slices = self.by_slice()
        if len(slices) < 2:
            return head
        width = max(map(len, slices))
        lines = [
            f"  {name:<{width}}  {share:6.1%} of {self.slices.count(name)}"
            for name, share in slices.items()
        ]
        return "\n".join([head, *lines])


def free_text(references: Iterable[str]) -> bool:
    """Whether none of `references` is a JSON object: compare such answers as text.

    >>> free_text(["yes", "no"]), free_text(["yes", "{}"])
    (True, False)
    """
    return all(scoring.parse_json_object(text) is None for text in references)


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
    """Generate an answer to each prompt and score it against the completion.

    Args:
        model, tokenizer, template, system, batch_size: as for ``generate``.
        dataset: records with ``prompt`` and ``completion`` (one JSON object, unless
            ``as_text``), and perhaps ``slice``.
        limit: score that many records only, chosen by ``stratified``: the same ones
            every time, each slice in its share. None scores all.
        max_new_tokens: None takes 8 more than the longest completion has tokens. A
            right answer that is spread over lines and indented needs more.
        as_text: compare answers as text, not as JSON.

    Raises:
        ValueError: the data set is empty, a record has no prompt or completion, or a
            completion is not a JSON object.

    >>> print(Evaluation(0.5, 0.75, ("{}", "?"), ("{}", "{}"), ("a", "b"), None, 2.0))
    exact match 50.0% of 2 · field F1 0.750 · 2.0 s
    """
    records = stratified(dataset, limit)
    prompts, references = column(records, "prompt"), column(records, "completion")
    slices = column(records, "slice") if "slice" in records[0] else None
    if not as_text:
        exact_match(references, references)  # a broken reference is said now
    if max_new_tokens is None:
        encoded = tokenizer(list(references), add_special_tokens=False)["input_ids"]
        max_new_tokens = max(map(len, encoded)) + 8
    # A layout with a place of its own for the input needs the record's fields.
    whole = template is not None and find_template(template).input is not None
    start = time.perf_counter()
    predictions = generate(
        model,
        tokenizer,
        records if whole else prompts,
        template=template,
        system=system,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    # Qwen3's own template has it before each answer, so a model tuned by it writes it.
    predictions = [_EMPTY_THOUGHT.sub("", text) for text in predictions]
    seconds = time.perf_counter() - start
    score = scoring.exact_text if as_text else exact_match
    return Evaluation(
        score(predictions, references),
        float("nan") if as_text else field_f1(predictions, references),
        tuple(predictions),
        references,
        prompts,
        slices,
        seconds,
        as_text,
    )
