"""Prefix tuning from scratch: learned keys and values at every layer. Lesson 06.

A prefix is one tensor of shape (L, 2, H_kv, n, d_head): for each of L layers the keys
and the values of n tokens that nobody wrote. H_kv counts the heads of keys and values,
which grouped-query attention has fewer of than of queries. The text's own tokens stand
behind them, at positions n, n + 1, ...

Sources: arXiv:2101.00190 (prefix tuning), arXiv:2110.07602 (P-tuning v2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import DynamicCache

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = [
    "PrefixMLP",
    "from_peft_rows",
    "prefix_cache",
    "prefix_from_text",
    "prefix_shape",
    "to_peft_rows",
    "with_prefix",
]


def prefix_shape(config: PretrainedConfig, n: int) -> tuple[int, int, int, int, int]:
    """The shape of a prefix of `n` virtual tokens, (L, 2, H_kv, n, d_head).

    Args:
        config: of a model; without grouped-query attention H_kv is the number of heads.
        n: virtual tokens.

    Examples:
        >>> from transformers import LlamaConfig
        >>> small = LlamaConfig(hidden_size=64, num_hidden_layers=3,
        ...                     num_attention_heads=8, num_key_value_heads=2)
        >>> prefix_shape(small, n=5)
        (3, 2, 2, 5, 8)
    """
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, 2, kv_heads, n, width


def prefix_cache(prefix: torch.Tensor, batch_size: int) -> DynamicCache:
    """Fill a cache with the prefix, once for each row of a batch.

    Args:
        prefix: (L, 2, H_kv, n, d_head); gradients reach it through the cache.
        batch_size: B.
    """
    cache = DynamicCache()
    for layer, pair in enumerate(prefix):
        keys, values = pair[:, None].expand(-1, batch_size, -1, -1, -1)
        cache.update(keys, values, layer)
    return cache


def with_prefix(
    model: PreTrainedModel,
    prefix: torch.Tensor,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    **more: Any,
) -> Any:
    """Run a causal language model behind a prefix.

    Args:
        model: with a cache; frozen or not.
        prefix: (L, 2, H_kv, n, d_head); it is cast to the model's dtype.
        input_ids: (B, T).
        attention_mask: (B, T), 0 on padding; None means that there is none.
        more: passed on to the model, `labels` (B, T) for one.

    Returns:
        What the model returns; logits are (B, T, V): the prefix gives none.
    """
    (B, T), n = input_ids.shape, prefix.shape[3]
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    seen = attention_mask.new_ones(B, n)
    return model(
        input_ids=input_ids,
        attention_mask=torch.cat([seen, attention_mask], dim=1),  # (B, n + T)
        position_ids=torch.arange(n, n + T, device=input_ids.device)[None],
        past_key_values=prefix_cache(prefix.to(model.dtype), B),
        **more,
    )


def prefix_from_text(model: PreTrainedModel, input_ids: torch.Tensor) -> torch.Tensor:
    """The keys and values that the model itself computes for a text.

    Args:
        model: a causal language model.
        input_ids: (1, n), the text.

    Returns:
        A prefix (L, 2, H_kv, n, d_head); behind it the model reads on as behind the
        text.
    """
    with torch.no_grad():
        cache = model(input_ids=input_ids, use_cache=True).past_key_values
    pairs = [torch.cat([layer.keys, layer.values]) for layer in cache.layers]
    return torch.stack(pairs)


class PrefixMLP(nn.Module):
    """A prefix made by a small network from one short row per virtual token.

    Args:
        shape: of the prefix, (L, 2, H_kv, n, d_head).
        width: of the rows; PEFT takes H_kv · d_head.
        hidden: units between the two linear layers.
    """

    def __init__(self, shape: tuple[int, ...], width: int, hidden: int) -> None:
        super().__init__()
        L, _, H_kv, n, d_head = self.shape = shape
        self.rows = nn.Parameter(torch.randn(n, width))
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.Tanh(),
            nn.Linear(hidden, L * 2 * H_kv * d_head),
        )

    def forward(self) -> torch.Tensor:
        """The prefix as it is now, (L, 2, H_kv, n, d_head)."""
        return from_peft_rows(self.mlp(self.rows), self.shape)


def from_peft_rows(rows: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Fold PEFT's layout, one row per virtual token, into a prefix.

    Args:
        rows: (n, L · 2 · H_kv · d_head).
        shape: of the prefix, (L, 2, H_kv, n, d_head).
    """
    L, _, H_kv, n, d_head = shape
    return rows.view(n, L, 2, H_kv, d_head).permute(1, 2, 3, 0, 4)


def to_peft_rows(prefix: torch.Tensor) -> torch.Tensor:
    """Lay a prefix out as PEFT keeps and saves it, (n, L · 2 · H_kv · d_head)."""
    return prefix.permute(3, 0, 1, 2, 4).flatten(1)
