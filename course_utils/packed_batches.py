"""A batch with less to compute: no padding, and a common beginning read once a row.

In a causal model a token depends on those before it alone. So the states of a beginning
that all examples share, such as a default system turn, are the same in each: a row
reads it once, and the rest of each example in that row attends to it. Each example
still sees nothing of its neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from course_utils.formatting import IGNORE, pack_examples

if TYPE_CHECKING:
    import torch

# Models whose code keeps examples apart where positions begin again, by a test of each;
# others are padded as usual.
PACKABLE = {"llama", "mistral", "qwen2", "qwen3"}

WIDEST = 256  # tokens: attention costs the square of a row's length
SHARED_AT_LEAST = 8  # tokens: fewer are not worth a mask of their own


def without_padding(
    model: Any, batch: Mapping[str, torch.Tensor]
) -> Mapping[str, torch.Tensor]:
    """The same examples in fewer rows, side by side, each seeing itself alone.

    The rows (first-fit decreasing, see `pack_examples`) are as long as leaves fewest
    positions to compute, and at most `WIDEST` tokens unless an example is longer. The
    loss is a sum over learned tokens, so it and its gradients stay the same up to
    rounding. (Dropout, where a model has it, is drawn once for what a row shares.)

    Args:
        model: the model that will read the batch.
        batch: ``input_ids``, ``labels``, ``attention_mask`` (B, T), padded.

    Returns:
        ``input_ids``, ``labels``, ``position_ids`` (rows, T), and with a beginning
        read once a row ``attention_mask`` (rows, 1, T, T), which is added to attention
        scores; the batch as it is where nothing would be gained, or where the model
        has virtual tokens in front of each row, or does not tell packed examples apart.
    """
    import torch

    if set(batch) != {"input_ids", "labels", "attention_mask"}:
        return batch
    adapters = getattr(model, "peft_config", {}).values()
    if any(getattr(config, "is_prompt_learning", False) for config in adapters):
        return batch
    config = getattr(model, "config", None)
    mask = batch["attention_mask"].bool()
    if getattr(config, "model_type", None) not in PACKABLE or not mask.any(dim=1).all():
        return batch
    examples = [
        {name: batch[name][i][mask[i]].tolist() for name in ("input_ids", "labels")}
        for i in range(len(mask))
    ]
    shared = shared_beginning(examples)
    if shared < SHARED_AT_LEAST or getattr(config, "sliding_window", None):
        shared = 0  # a mask of our own would replace that of the window
    beginning = examples[0]["input_ids"][:shared]
    rest = [{name: v[shared:] for name, v in one.items()} for one in examples]
    longest, total = (f(len(one["input_ids"]) for one in rest) for f in (max, sum))
    widths = range(longest, max(longest, min(WIDEST - shared, total)) + 1, 8)
    tried = ((width, pack_examples(rest, width)) for width in widths)
    width, rows = min(tried, key=lambda pair: (shared + pair[0]) * len(pair[1]))
    if len(rows) * (shared + width) >= mask.numel():
        return batch
    packed: dict[str, list] = {"input_ids": [], "labels": [], "position_ids": []}
    for row in rows:
        extra = width - len(row["input_ids"])
        packed["input_ids"].append(row["input_ids"] + [0] * extra)
        packed["labels"].append(row["labels"] + [IGNORE] * extra)
        packed["position_ids"].append(row["position_ids"] + list(range(extra)))
    made = {name: torch.tensor(values) for name, values in packed.items()}
    if shared:
        dtype = model.get_input_embeddings().weight.dtype
        made = _after(torch.tensor(beginning), made, dtype)
    return {name: v.to(batch["input_ids"].device) for name, v in made.items()}


def shared_beginning(examples: Sequence[Mapping[str, Sequence[int]]]) -> int:
    """How many tokens all examples begin with and none of them learns from.

    The last position of a beginning predicts the token after it, which differs from
    example to example: so the beginning ends one token before the first learned one.

    >>> one = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, -100, 8]}
    >>> shared_beginning([one, one | {"input_ids": [5, 6, 9, 8]}])
    2
    >>> shared_beginning([one, one])
    2
    """
    if len(examples) < 2:
        return 0
    columns = zip(*(one["input_ids"] for one in examples), strict=False)
    same = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, columns))
    learned = (
        sum(1 for _ in takewhile(lambda label: label == IGNORE, one["labels"]))
        for one in examples
    )
    return max(min(same, min(learned) - 1), 0)


def _after(
    beginning: torch.Tensor, rows: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Put a beginning (P,) before each row, and a mask that lets all of it see it."""
    import torch

    count, width = rows["input_ids"].shape
    size = len(beginning)
    before = {
        "input_ids": beginning,
        "labels": torch.full((size,), IGNORE),
        "position_ids": torch.arange(size),
    }
    positions = rows["position_ids"]
    # Each example, and what fills a row up, has a number; the beginning has 0.
    owner = torch.cat(
        (torch.zeros(count, size), (positions == 0).cumsum(dim=1)), dim=1
    ).long()
    seen = (owner[:, None, :] == owner[:, :, None]) | (owner[:, None, :] == 0)
    seen = seen.tril()  # (rows, T, T): query by key
    made = {
        name: torch.cat((value.expand(count, size), rows[name]), dim=1)
        for name, value in before.items()
    }
    made["position_ids"][:, size:] += size
    hidden = torch.full(seen.shape, -torch.inf, dtype=dtype)
    made["attention_mask"] = hidden.masked_fill(seen, 0)[:, None]
    return made
