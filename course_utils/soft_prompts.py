"""Soft prompts from scratch: learned rows in front of the embeddings, from lesson 05.

A language model turns token ids (B, T) into embeddings (B, T, d). Prompt tuning puts
`n` rows (n, d) in front of them, and trains nothing but those rows. P-tuning trains a
small network that makes the rows, and throws it away afterwards.

Sources: prompt tuning, arXiv:2104.08691, section 2; P-tuning, arXiv:2103.10385,
section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity, pad

__all__ = ["LSTMPromptEncoder", "PromptEncoder", "nearest_words", "with_soft_prompt"]


def with_soft_prompt(
    model: Any, rows: torch.Tensor, batch: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Put rows in front of a batch; call the result as `model(**inputs)`.

    The labels of the rows are -100, since nobody knows what should stand there, and
    the attention mask is 1, since every token may look at them.

    Args:
        model: a causal language model; its weights are only read.
        rows: (n, d), in any floating-point type.
        batch: `input_ids`, `attention_mask` and perhaps `labels`, each (B, T), padded
            on either side.

    Returns:
        `inputs_embeds` (B, n + T, d), `attention_mask` and `labels` (B, n + T), and
        `position_ids` (B, n + T), which count the rows and leave padding out.
    """
    n, mask = len(rows), batch["attention_mask"]
    words = model.get_input_embeddings()(batch["input_ids"])  # (B, T, d)
    front = rows.to(words.dtype).expand(len(words), -1, -1)  # (B, n, d)
    mask = pad(mask, (n, 0), value=1)
    inputs = {
        "inputs_embeds": torch.cat([front, words], dim=1),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
    }
    if "labels" in batch:
        inputs["labels"] = pad(batch["labels"], (n, 0), value=-100)
    return inputs


class PromptEncoder(nn.Module):
    """P-tuning's network: an embedding for each row, and an MLP that mixes its numbers.

    Args:
        n: rows, also called virtual tokens.
        d: width of the model's embeddings.
        hidden: width inside the MLP.

    Examples:
        >>> tuple(PromptEncoder(20, 576, 128)().shape)
        (20, 576)
    """

    def __init__(self, n: int, d: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n, d)
        self.mlp = nn.Sequential(
            nn.Linear(d, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, d),
        )

    def forward(self) -> torch.Tensor:
        """The rows (n, d), with a gradient to everything that makes them."""
        return self.mlp(self.embedding.weight)


class LSTMPromptEncoder(nn.Module):
    """The paper's first network: an LSTM lets each row see its neighbours.

    Args:
        n, d, hidden: as for `PromptEncoder`.
        layers: of the LSTM, which reads the rows in both directions.

    Examples:
        >>> tuple(LSTMPromptEncoder(20, 576, 128)().shape)
        (20, 576)
    """

    def __init__(self, n: int, d: int, hidden: int, layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n, d)
        self.lstm = nn.LSTM(d, hidden, layers, bidirectional=True, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, d)
        )

    def forward(self) -> torch.Tensor:
        """The rows (n, d), with a gradient to everything that makes them."""
        return self.mlp(self.lstm(self.embedding.weight[None])[0])[0]


def nearest_words(
    rows: torch.Tensor, table: torch.Tensor, tokenizer: Any, k: int = 1
) -> list[list[tuple[str, float]]]:
    """For each row, the k tokens whose embeddings point most nearly the same way.

    Args:
        rows: (n, d).
        table: the model's embeddings (V, d).
        tokenizer: has `decode`.
        k: tokens a row.

    Returns:
        For each row k pairs of text and cosine similarity, nearest first.
    """
    found = []
    for row in rows.float():
        near = cosine_similarity(row[None], table.float()).topk(k)
        pairs = zip(near.indices.tolist(), near.values.tolist(), strict=True)
        found.append([(tokenizer.decode([token]), value) for token, value in pairs])
    return found
