"""One vector for a whole text: the mean over its tokens, for encoders made that way.

The built-in encoder is a sentence model: it was trained so that the mean of its last
layer's rows, at length 1, stands for the text (see its card). Its file also holds a
"pooler" for the first row, which that training never used; a head behind it sees
numbers of size 0.05, and learns as slowly as that.

Source: arXiv:1908.10084, section 3 (pooling strategies).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["MeanPooler", "use_mean_pooling"]


class MeanPooler(nn.Module):
    """Mean of the rows that the attention mask names, at length √width.

    Length √width instead of 1 gives numbers of size 1, as a fresh head expects them.
    It has no weights. `remember` must see the encoder's arguments first: the pooler
    of a BERT is called with the rows alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mask: torch.Tensor | None = None

    def remember(self, encoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Keep the attention mask of this call; a forward pre-hook of the encoder."""
        self.mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Pool one batch.

        Args:
            rows: (B, T, width), the last layer's. Virtual tokens that stand in the
                input are among them; those of a prefix have no rows.

        Returns:
            (B, width).
        """
        B, T, width = rows.shape
        mask, self.mask = self.mask, None
        if mask is None:
            mask = rows.new_ones(B, T)
        weights = mask[:, -T:, None].to(rows.device, torch.float32)
        total = (rows.float() * weights).sum(dim=1)  # its length does not matter
        return width**0.5 * nn.functional.normalize(total, dim=-1).to(rows.dtype)


def use_mean_pooling(model: Any) -> Any:
    """Let a BERT classifier's head read the mean over tokens.

    Args:
        model: a `BertForSequenceClassification`, changed in place.

    Returns:
        The same model. Its configuration says `pooling="mean"`, so that
        `models.load_classifier` pools alike what was saved.
    """
    model.config.pooling = "mean"
    model.bert.pooler = pooler = MeanPooler()
    model.bert.register_forward_pre_hook(pooler.remember, with_kwargs=True)
    return model
