"""How likely a model finds the right answers: completion loss and perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from course_utils.decoding import decodes, inference_state, left_batch
from course_utils.formatting import IGNORE, tokenize_example
from course_utils.selection import stratified

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from course_utils.formatting import Template


@dataclass(frozen=True)
class Perplexity:
    """How surprised a model is by the right answers.

    Attributes:
        loss: mean negative log-likelihood of a completion token, in nats.
        perplexity: exp(loss).
        tokens: number of completion tokens, end of turn included.
    """

    loss: float
    perplexity: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f} nats a token · perplexity {self.perplexity:.3f} "
            f"· {self.tokens} tokens"
        )


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Iterable[Mapping[str, Any]],
    *,
    template: str | Template = "chatml",
    system: str | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    batch_size: int = 16,
) -> Perplexity:
    """Perplexity of the completions, each given its prompt.

    PPL = exp(-(1/N) Σ log p(token | all tokens before it)), summed over the N tokens
    of all completions, their end of turn included: the tokens that training learns.
    Logits are made from the first learned position on, not for the prompts.

    Args:
        model, tokenizer: as for ``generate``.
        dataset: records that ``tokenize_example`` reads.
        template, system, max_length: as for ``tokenize_example``.
        limit: as for ``evaluate``.
        batch_size: records at once.
    """
    import torch
    from torch.nn.functional import cross_entropy

    options = {"template": template, "system": system, "max_length": max_length}
    records = stratified(dataset, limit)
    rows = [tokenize_example(record, tokenizer, **options) for record in records]
    rows.sort(key=lambda row: len(row["input_ids"]))
    if not decodes(model):
        batch_size = 1  # no padding, so nothing that such a model could mistake
    total, tokens = 0.0, 0
    with torch.no_grad(), inference_state(model):
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            first = [_first_learned(row["labels"]) for row in batch]
            lengths = [len(row["labels"]) for row in batch]
            keep = max(n - i for n, i in zip(lengths, first, strict=True)) + 1
            labels = torch.full((len(batch), keep), IGNORE)
            for place, row in zip(labels, batch, strict=True):
                end = row["labels"][-keep:]
                place[keep - len(end) :] = torch.tensor(end)
            logits = _last_logits(model, [r["input_ids"] for r in batch], first, keep)
            labels = labels[:, -logits.shape[1] + 1 :].to(logits.device)
            learned = labels != IGNORE
            chosen = logits[:, :-1][learned].float()
            total += cross_entropy(chosen, labels[learned], reduction="sum").item()
            tokens += int(learned.sum())
    loss = total / tokens
    return Perplexity(loss, math.exp(loss), tokens)


def _first_learned(labels: Sequence[int]) -> int:
    return next(i for i, label in enumerate(labels) if label != IGNORE)


def _last_logits(model: Any, rows: list[list[int]], first: list[int], keep: int) -> Any:
    """Logits (B, at most `keep`, V) of the last positions, rows aligned at their end.

    What the rows share is read once, but for the token before a learned one.
    """
    import torch

    if decodes(model):
        batch = left_batch(model, rows, share_at_most=min(first) - 1)
        return batch.network(**batch.inputs, logits_to_keep=keep).logits
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor(rows, device=device)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -keep:]
