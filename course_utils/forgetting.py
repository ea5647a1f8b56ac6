"""General questions before and after a fine-tuning: what the model forgot."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from course_utils.inference import generate
from course_utils.likelihood import Perplexity
from course_utils.selection import column, stratified

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class AnswerShare:
    """General questions: how many answers contain the expected one.

    Attributes:
        share: 0 to 1.
        correct: one truth value a question.
        answers, prompts: strings, in the order of the data.
    """

    share: float
    correct: tuple[bool, ...]
    answers: tuple[str, ...]
    prompts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{sum(self.correct)} of {len(self.correct)} answers ({self.share:.1%})"


def contains_answer(text: str, expected: Sequence[str]) -> bool:
    """Say whether `text` holds one of the expected answers as whole words.

    Upper and lower case are the same.

    >>> contains_answer("It is PARIS, of course.", ["Paris"])
    True
    >>> contains_answer("There are 14 of them.", ["4"])
    False
    """
    words = "|".join(re.escape(answer.strip()) for answer in expected)
    return re.search(rf"(?<!\w)(?:{words})(?!\w)", text, re.IGNORECASE) is not None


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

    Args:
        model, tokenizer: as for ``generate``.
        dataset: records with ``prompt`` and ``answers`` (strings that each count as
            right, or one string), or ``answer``, one string.
        limit: as for ``evaluate``.
        max_new_tokens, options: as for ``generate``.

    Raises:
        ValueError: a record has no answer to look for.
    """
    records = stratified(dataset, limit)
    prompts = column(records, "prompt")
    expected = [_expected(i, record) for i, record in enumerate(records)]
    answers = generate(
        model, tokenizer, prompts, max_new_tokens=max_new_tokens, **options
    )
    correct = tuple(map(contains_answer, answers, expected))
    return AnswerShare(sum(correct) / len(correct), correct, tuple(answers), prompts)


def _expected(i: int, record: Mapping[str, Any]) -> list[str]:
    found = record.get("answers") or record.get("answer")
    texts = [found] if isinstance(found, str) else list(found or ())
    texts = [text for text in texts if text.strip()]  # a blank would stand everywhere
    if not texts:
        raise ValueError(
            f"record {i} has no 'answers' (a list of texts) and no 'answer' (a text); "
            f"its fields are {sorted(record)}"
        )
    return texts


@dataclass(frozen=True)
class Forgetting:
    """What a model lost on general questions while it learned something else.

    Attributes:
        loss_change: mean completion loss after minus before, nats a token; above 0
            where the model forgot.
        share_change: share of right answers after minus before.
        lost: the questions answered right before and wrong after.
    """

    loss_change: float
    share_change: float
    lost: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"completion loss {self.loss_change:+.3f} nats · right answers "
            f"{100 * self.share_change:+.1f} points · {len(self.lost)} lost"
        )


def forgetting(
    before: tuple[Perplexity, AnswerShare], after: tuple[Perplexity, AnswerShare]
) -> Forgetting:
    """Compare ``perplexity`` and ``answer_share`` before and after a fine-tuning.

    Raises:
        ValueError: they were not measured on the same questions.
    """
    (loss0, share0), (loss1, share1) = before, after
    if share0.prompts != share1.prompts or loss0.tokens != loss1.tokens:
        raise ValueError("before and after were not measured on the same questions")
    pairs = zip(share0.prompts, share0.correct, share1.correct, strict=True)
    lost = tuple(prompt for prompt, was, still in pairs if was and not still)
    return Forgetting(loss1.loss - loss0.loss, share1.share - share0.share, lost)
